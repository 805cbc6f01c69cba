"""`Summary`: what a file of examples comes to in tokens; `warnings`: what of it will bite in training, and the remedy.

`umbel data`, `umbel check`, `umbel status` and the daemon's log all take their sentences from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel.site.config import SiteConfig

DATA, EVAL_DATA, RELEASED = "[training].data", "[training].eval_data", "examples that users gave"
"""Names of a site's files in sentences; a guard's is `guard_name`."""
MANY = 0.1
"""Share of a file's examples from which on it is worth a warning."""


@dataclass(frozen=True)
class Summary:
    """Figures about one file; they hold no text."""

    examples: int
    """Examples in the file, refused ones included."""
    refused: int
    """Examples that cannot be used."""
    cut: int
    """Examples that are longer than seq_len and lose their end."""
    dropped: int
    """Examples that are left out, because seq_len leaves no token of an answer."""
    untold: int
    """Answers without a loss, because nothing comes before them."""
    repeated: int
    """Examples that are in the file already, further up."""
    unending: int
    """Examples whose last answer does not end with a token at which the engine stops."""
    loss_tokens: int
    """Tokens with a loss, within seq_len."""
    median: int
    """Half of the examples have at most as many tokens, before cutting."""
    p95: int
    """95 % of the examples have at most as many tokens."""
    longest: int
    """Tokens of the longest example."""
    padding: float
    """Share of padding when every row is seq_len long, as in the token files."""

    @property
    def usable(self) -> int:
        """Examples that training or a probe can use."""
        return self.examples - self.refused - self.dropped


def quantile(sorted_values: Sequence[int], share: float) -> int:
    """Return the smallest value that is not below `share` of all; 0 where there is none."""
    place = -int(-share * len(sorted_values) // 1) - 1  # rounded up, from 0
    return sorted_values[max(0, place)] if sorted_values else 0


def files_of(config: SiteConfig) -> dict[str, Path]:
    """Return a site's files of examples by their names in sentences, without those that users gave."""
    files = {DATA: config.training.data}
    files |= {EVAL_DATA: config.training.eval_data} if config.training.eval_data else {}
    return files | {guard_name(guard.name): guard.data for guard in config.shadow.guard}


def guard_name(guard: str) -> str:
    """Return the name of a guard's file in sentences."""
    return f"guard {guard}"


def warnings(config: SiteConfig, files: Mapping[str, Summary], held_out: int | None) -> list[str]:
    """Say what will bite although the site can be served: one sentence for each, with its remedy.

    `files` is keyed by the names at the top of this module; `held_out` counts the examples that probes can use, None
    where `files` does not decide it.
    """
    found = [sentence for name, summary in files.items() for sentence in _of_file(name, summary, config)]
    return found + _verdicts(config, files, held_out)


def _of_file(name: str, summary: Summary, config: SiteConfig) -> list[str]:
    """Say what will bite in one file."""
    seq_len, total = config.training.seq_len, summary.examples - summary.refused
    if not total:
        return []
    of_all = f"of {total:,} examples of {name}"
    told = []
    if summary.dropped > MANY * total:
        told.append(
            f"{summary.dropped:,} {of_all} are left out, because their answer begins behind [training].seq_len = "
            f"{seq_len}; raise it (the longest example has {summary.longest:,} tokens) or shorten the prompts"
        )
    if summary.cut - summary.dropped > MANY * total:
        told.append(
            f"{summary.cut - summary.dropped:,} {of_all} are cut at [training].seq_len = {seq_len}, so the end of the "
            f"answer is not learnt; raise it (95 % have at most {summary.p95:,} tokens)"
        )
    if summary.repeated > MANY * total:
        told.append(
            f"{summary.repeated:,} {of_all} repeat one further up, and count each time; remove them, unless they shall"
        )
    if summary.unending:
        told.append(
            f"{summary.unending:,} {of_all} end with a token at which the engine does not stop: versions will go on "
            "after the answer; add the id of the token that ends a turn to eos_token_id in the base's "
            "generation_config.json"
        )
    return told


def _verdicts(config: SiteConfig, files: Mapping[str, Summary], held_out: int | None) -> list[str]:
    """Say what will keep this site from promoting any version."""
    least = config.shadow.min_examples
    more = "more eval_data" if config.training.eval_data else "more data, or eval_data,"
    asked = {} if held_out is None else {"held-out examples": (held_out, more)}
    for guard in config.shadow.guard:
        if (summary := files.get(guard_name(guard.name))) is not None:
            asked[f"examples of guard {guard.name}"] = (summary.usable, "it more")
    return [
        f"{number} {name} are fewer than [shadow].min_examples = {least}: no version can be promoted; "
        f"give {remedy} or lower it"
        for name, (number, remedy) in asked.items()
        if number < least
    ]
