"""Compares the training losses of two runs of one recipe on the same data, for example in BF16 and in FP8.

    python launch/compare_precisions.py --workdir_a=runs/proxy_bf16 --workdir_b=runs/proxy_fp8 --output=comparison

Prints the mean losses and their relative difference for every tenth and for the last half of the steps that both
workdirs have; --output=PATH writes them with the curves to PATH.json, and a plot to PATH.png.
"""

from absl import flags

from dsv3_jax import config_flags

WORKDIR_A = flags.DEFINE_string("workdir_a", None, "of the run that differences are relative to", required=True)
WORKDIR_B = flags.DEFINE_string("workdir_b", None, "of the other run", required=True)
OUTPUT = flags.DEFINE_string("output", None, "path, without ending, of the JSON file and the plot")


def main() -> None:
    from dsv3_jax.benchmarks import loss_curves, report

    comparison = loss_curves.compare(WORKDIR_A.value, WORKDIR_B.value)
    rows = comparison.rows()
    report.show(f"{comparison.names[1]} against {comparison.names[0]}", rows)
    print(f"difference over the last half: {rows[-1]['difference %']:+.4f}%")
    if OUTPUT.value:
        loss_curves.write_json(comparison, f"{OUTPUT.value}.json")
        loss_curves.write_plot(comparison, f"{OUTPUT.value}.png")
        print(f"wrote {OUTPUT.value}.json and {OUTPUT.value}.png")


if __name__ == "__main__":
    config_flags.run(main)
