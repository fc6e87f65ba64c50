"""The data card of a prepared corpus: one page of markdown and its plots, made from the manifest and the offsets."""

import itertools
import pathlib
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv3_jax.data import prepared, shards
from dsv3_jax.data.cleaning import REASONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CARD = "DATA_CARD.md"
PLOTS = {
    "shares.png": "Shares of the sources: of the text, of the tokens, of the training windows",
    "document_lengths.png": "Lengths of the training documents",
    "bytes_per_token.png": "UTF-8 bytes per token",
    "removed.png": "What was left out, and why",
}
MAX_EXAMPLES = 8
DUPLICATES = ("exact_duplicate", "near_duplicate")


def write_card(corpus: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes DATA_CARD.md and its plots into a corpus.

    Args:
      corpus: directory that holds the token files.
      manifest: what its manifest.json says (files apart).
    """
    sources = manifest["sources"]
    lengths = {
        name: np.diff(np.load(corpus / account["splits"]["train"]["offsets_file"])) for name, account in sources.items()
    }
    height = 1.6 + 0.32 * len(sources)
    _write_plot(corpus / "shares.png", height + 0.3 * len(sources), lambda axes: draw_shares(axes, sources))
    _write_plot(corpus / "document_lengths.png", 4.5, lambda axes: draw_lengths(axes, lengths))
    _write_plot(corpus / "bytes_per_token.png", height, lambda axes: draw_bytes_per_token(axes, sources))
    _write_plot(corpus / "removed.png", height, lambda axes: draw_removed(axes, sources))
    with shards.written_whole(corpus / CARD) as file:
        file.write(card_text(manifest, lengths).encode())


def card_text(manifest: dict[str, Any], lengths: dict[str, np.ndarray]) -> str:
    """Gives the markdown of a data card.

    Args:
      manifest: of the corpus.
      lengths: source -> tokens of each training document.
    """
    sources = manifest["sources"]
    totals = {split: _totals(sources, split) for split in prepared.SPLITS}
    plots = [f"![{title}]({name})" for name, title in PLOTS.items()]
    sections = [
        "# Data card",
        f"{totals['train']['documents']:,} documents, {totals['train']['utf8_bytes']:,} bytes of text, "
        f"{totals['train']['tokens']:,} tokens to train on; {totals['heldout']['documents']:,} documents, "
        f"{totals['heldout']['utf8_bytes']:,} bytes, {totals['heldout']['tokens']:,} tokens held out. Vocabulary "
        f"{manifest['tokenizer']['vocab_size']:,}. Numbers below are of the training part unless they say otherwise.",
        "## Sources",
        _table(
            ["source", "kind", "language", "weight", "documents", "bytes", "tokens", "bytes / token",
             "median tokens", "held-out documents"],
            [_source_row(name, account, lengths[name], sources) for name, account in sources.items()],
            num_words=3,
        ),
        "## What was left out",
        _table(
            ["source", "language", "found", "kept", "kept bytes", *_reasons(sources)],
            [_removed_row(name, account, sources) for name, account in sources.items()],
            num_words=2,
        ),
        "Documents; found and kept count both splits, and found every file, row or record. "
        + "; ".join(f"`{reason}`: {REASONS[reason]}" for reason in _reasons(sources) if reason in REASONS),
        *_examples(sources),
        "## How it is encoded",
        _table(
            ["source", "fill in the middle", "prefix / middle / suffix, mean characters", "boundaries split"],
            [_encoding_row(name, account["splits"]["train"]["statistics"]) for name, account in sources.items()],
            num_words=1,
        ),
        "Share of the training documents in the form prefix, suffix, middle (§4.1); share of the tokens that join "
        "punctuation with line breaks which were split in two. Held-out documents are plain text.",
        "## Plots",
        *plots,
        "## Licences",
        "\n".join(f"- {name}: {account['licence'] or 'not stated'}" for name, account in sources.items()),
        "## How to make it again",
        _recipe_text(manifest),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def draw_shares(axes: "Axes", sources: dict[str, dict]) -> None:
    """Draws each source's share of bytes, of tokens and, by its weight, of training windows."""
    of_train = {name: account["splits"]["train"] for name, account in sources.items()}
    shares = {
        "bytes": _shares([account["utf8_bytes"] for account in of_train.values()]),
        "tokens": _shares([account["tokens"] for account in of_train.values()]),
        "training windows (weight)": _shares([account["weight"] for account in sources.values()]),
    }
    places = np.arange(len(sources))
    for number, (label, values) in enumerate(shares.items()):
        axes.barh(places + 0.27 * (number - 1), values, height=0.25, label=label)
    _name_sources(axes, sources)
    axes.set_xlabel("share, %")
    axes.legend()


def draw_lengths(axes: "Axes", lengths: dict[str, np.ndarray]) -> None:
    """Draws, for each source, the share of documents shorter than a number of tokens."""
    for number, (name, of_source) in enumerate(lengths.items()):
        if len(of_source):
            shares = 100 * np.arange(1, len(of_source) + 1) / len(of_source)
            style = ("-", "--", ":")[number // 10 % 3]  # colors repeat after ten
            axes.plot(np.sort(of_source), shares, label=name, linestyle=style)
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a document, bos and eos included")
    axes.set_ylabel("documents at most this long, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=1 + len(lengths) // 12)


def draw_bytes_per_token(axes: "Axes", sources: dict[str, dict]) -> None:
    """Draws how many bytes of text a token stands for in each source: higher is better compressed."""
    values = [_bytes_per_token(account["splits"]["train"]) for account in sources.values()]
    axes.bar_label(axes.barh(np.arange(len(sources)), values), fmt="%.2f", padding=2)
    _name_sources(axes, sources)
    axes.set_xlabel("UTF-8 bytes per token")
    axes.margins(x=0.1)


def draw_removed(axes: "Axes", sources: dict[str, dict]) -> None:
    """Draws the share of each source's documents that was left out, by reason. What a budget cut is not looked at."""
    lefts = np.zeros(len(sources))
    found = [_num_found(account) - _num_removed(account, "over_budget") for account in sources.values()]
    reasons = [reason for reason in _reasons(sources) if reason != "over_budget"]
    for number, reason in enumerate(reasons):
        counts = np.array([_num_removed(account, reason) for account in sources.values()])
        shares = 100 * counts / np.maximum(found, 1)
        hatch = "//" * (number // 10)  # colors repeat after ten
        axes.barh(np.arange(len(sources)), shares, left=lefts, label=reason.replace("_", " "), hatch=hatch)
        lefts += shares
    _name_sources(axes, sources)
    axes.set_xlabel("documents left out, % of those found")
    if reasons:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))


def _totals(sources: dict[str, dict], split: str) -> dict[str, int]:
    names = ("documents", "utf8_bytes", "tokens")
    return {name: sum(account["splits"][split][name] for account in sources.values()) for name in names}


def _source_row(name: str, account: dict, lengths: np.ndarray, sources: dict[str, dict]) -> list[str]:
    train = account["splits"]["train"]
    weight = account["weight"] / sum(other["weight"] for other in sources.values())
    return [
        name, account["kind"], account["language"], f"{weight:.1%}", f"{train['documents']:,}",
        f"{train['utf8_bytes']:,}", f"{train['tokens']:,}", f"{_bytes_per_token(train):.2f}",
        f"{int(np.median(lengths)):,}" if len(lengths) else "-", f"{account['splits']['heldout']['documents']:,}",
    ]  # fmt: skip


def _removed_row(name: str, account: dict, sources: dict[str, dict]) -> list[str]:
    splits = account["splits"].values()
    kept = [sum(split[field] for split in splits) for field in ("documents", "utf8_bytes")]
    removed = [_num_removed(account, reason) for reason in _reasons(sources)]
    return [name, account["language"], *(f"{number:,}" for number in (_num_found(account), *kept, *removed))]


def _examples(sources: dict[str, dict]) -> list[str]:
    """Gives a list of near duplicates that were removed, from as many sources as possible; or nothing."""
    pairs = [account["removed"].get("near_duplicate", {"examples": []})["examples"] for account in sources.values()]
    turns = (pair for turn in itertools.zip_longest(*pairs) for pair in turn if pair is not None)
    lines = [f"- `{document}` repeats `{repeated}`" for document, repeated in itertools.islice(turns, MAX_EXAMPLES)]
    return ["Near duplicates, for example:\n\n" + "\n".join(lines)] if lines else []


def _encoding_row(name: str, counts: dict[str, int]) -> list[str]:
    num_cut = counts["fim_documents"]
    parts = [counts[f"fim_{part}_characters"] for part in ("prefix", "middle", "suffix")]
    return [
        name,
        _percent(num_cut, counts["documents"]),
        " / ".join(f"{part / num_cut:,.0f}" for part in parts) if num_cut else "-",
        _percent(counts["boundary_splits"], counts["boundary_tokens"]),
    ]


def _recipe_text(manifest: dict[str, Any]) -> str:
    arguments = dict(manifest["arguments"])
    sources, recipe = arguments.pop("sources"), arguments.pop("recipe")
    if recipe:
        given = [f"--recipe={recipe['path']}"]
        note = f"The recipe's SHA-256 is `{recipe['sha256']}`, the"
    else:
        given = [f"--source={path}" for source in sources for path in source["paths"]]
        note = "The"
    if arguments["tokenizer"]:
        arguments["tokenizer"] = "DIRECTORY"
        del arguments["vocab_size"]
    given += [f"--{name}={value}" for name, value in arguments.items() if value != ""]
    command = " ".join(shlex.quote(word) for word in ["python", "launch/prepare_data.py", "--output=CORPUS", *given])
    files = _table(
        ["source", "SHA-256 of the training tokens"],
        [[name, f"`{account['splits']['train']['sha256']}`"] for name, account in manifest["sources"].items()],
        num_words=2,
    )
    return f"```\n{command}\n```\n\n{note} tokenizer's `{manifest['tokenizer']['sha256']}`.\n\n{files}"


def _table(header: list[str], rows: list[list[str]], *, num_words: int) -> str:
    """Gives a markdown table whose first num_words columns are words and the others numbers."""
    rule = [":--" if column < num_words else "--:" for column in range(len(header))]
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _reasons(sources: dict[str, dict]) -> list[str]:
    """Lists the reasons for which any source lost documents: the duplicates last."""
    reasons = {reason for account in sources.values() for reason in account["removed"]}
    return sorted(reasons - set(DUPLICATES)) + [reason for reason in DUPLICATES if reason in reasons]


def _num_found(account: dict) -> int:
    return account["collected"]["rows"]


def _num_removed(account: dict, reason: str) -> int:
    return account["removed"].get(reason, {"documents": 0})["documents"]


def _bytes_per_token(split: dict) -> float:
    return split["utf8_bytes"] / max(1, split["tokens"])


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _shares(values: list[float]) -> np.ndarray:
    return 100 * np.array(values) / max(sum(values), 1e-12)


def _name_sources(axes: "Axes", sources: dict[str, dict]) -> None:
    axes.set_yticks(np.arange(len(sources)), list(sources))
    axes.margins(y=0.02)
    axes.invert_yaxis()


def _write_plot(path: pathlib.Path, height: float, draw: Callable[["Axes"], None]) -> None:
    """Draws a figure 8 inches wide. Its bytes depend on the drawing alone."""
    from matplotlib.figure import Figure  # takes a second, and the workers that load this module never draw

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(PLOTS[path.name])
    draw(axes)
    with shards.written_whole(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
