"""`Summary`: what a file of examples comes to in tokens; `warnings`: what of it will bite in training, and the remedy.

`umbel data`, `umbel check`, `umbel status` and the daemon's log all take their sentences from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel.site.config import SiteConfig

DATA, EVAL_DATA, RELEASED = "[training].data", "[training].eval_data", "examples that users gave"
"""Names of a site's files in sentences; a guard's is `guard_name`."""
HELD_OUT = "held-out examples"
"""Name of what is held out in sentences, be it eval_data or a part of the data."""
MANY = 0.1
"""Share of a file's examples from which on it is worth a warning."""
LARGE_GROUP = 10
"""Examples of one group from which on it is worth a warning."""
ALONE = 0.8
"""Share of examples that has to count for their number to be told alone."""
GROUP_REMEDY = 'where the first user turn says little, as a greeting does, give each conversation a "group"'


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
    groups: int
    """Groups of examples that ask the same, or have the same `group`: they are trained on or held out together."""
    largest_group: int
    """Different examples of the largest group."""
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


@dataclass(frozen=True)
class Asked:
    """How much a set of examples tells that versions are compared on."""

    examples: int
    """Different examples."""
    counts_as: float
    """Independent examples of equal length that would tell as much; `min_examples` is of these."""
    twin: str = ""
    """Name of a set that asks all that this one asks; empty where there is none."""


def quantile(sorted_values: Sequence[int], share: float) -> int:
    """Return the smallest value that is not below `share` of all; 0 where there is none."""
    place = -int(-share * len(sorted_values) // 1) - 1  # rounded up, from 0
    return sorted_values[max(0, place)] if sorted_values else 0


def files_of(config: SiteConfig, adapter: str) -> dict[str, Path]:
    """Return an adapter's files of examples by their names in sentences, without those that users gave."""
    held_out = config.eval_data(adapter)
    files = {DATA: config.data(adapter)} | ({EVAL_DATA: held_out} if held_out else {})
    return files | {guard_name(guard.name): guard.data for guard in config.policy(adapter).guard}


def setting_of(config: SiteConfig, adapter: str, name: str) -> str:
    """Return the setting that names a file: `[training].data`, or `[[adapter]] support.data`; else the file's name."""
    own = {DATA: "data", EVAL_DATA: "eval_data"}.get(name)
    return f"[[adapter]] {adapter}.{own}" if own and getattr(config.section(adapter), own) else name


def guard_name(guard: str) -> str:
    """Return the name of a guard's file in sentences."""
    return f"guard {guard}"


def warnings(
    config: SiteConfig,
    adapter: str,
    files: Mapping[str, Summary],
    asked: Mapping[str, Asked],
    withheld: Mapping[str, int],
) -> list[str]:
    """Say what will bite in an adapter's data although it can be served: one sentence for each, with its remedy.

    `files` and `withheld` (examples that are not trained on because they are asked) are keyed by the names of files,
    `asked` by HELD_OUT and the names of guards' files; what is not known is left out of them.
    """
    found = [
        sentence
        for name, summary in files.items()
        for sentence in (
            *_of_file(setting_of(config, adapter, name), summary, config),
            *_withheld(setting_of(config, adapter, name), summary, withheld.get(name, 0)),
        )
    ]
    found += _verdicts(config, adapter, asked)
    return [f"{adapter}: {sentence}" for sentence in found] if len(config.adapters) > 1 else found


def _withheld(name: str, summary: Summary, count: int) -> list[str]:
    """Say that much of a file is not trained on."""
    if count <= MANY * summary.usable:
        return []
    remedy = f"; {GROUP_REMEDY}" if name != RELEASED else ""
    return [
        f"{count:,} of {summary.usable:,} examples of {name} are not trained on, because held-out examples or guards "
        f"begin with the same user turn, or have the same group{remedy}"
    ]


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
    if summary.largest_group >= LARGE_GROUP and summary.largest_group > MANY * total and name != RELEASED:
        told.append(
            f"{summary.largest_group:,} {of_all} begin with the same user turn, or have the same group, and so count "
            f"as one in verdicts and are on one side; {GROUP_REMEDY}"
        )
    if summary.unending:
        told.append(
            f"{summary.unending:,} {of_all} end with a token at which the engine does not stop: versions will go on "
            "after the answer; add the id of the token that ends a turn to eos_token_id in the base's "
            "generation_config.json"
        )
    return told


def _verdicts(config: SiteConfig, adapter: str, asked: Mapping[str, Asked]) -> list[str]:
    """Say what will keep this site from promoting any version, and which guards are none."""
    least = config.shadow.min_examples
    more = "more eval_data" if config.eval_data(adapter) else "more data, or eval_data, or a larger eval_fraction,"
    told = []
    for name, found in asked.items():
        if found.twin:
            told.append(
                f"all that {name} asks is asked by {found.twin}, too: it protects nothing more, and the more guards "
                "there are, the more clearly a version must be worse on one; give it other examples, or leave it out"
            )
        if found.counts_as >= least:
            continue
        what = f"{found.examples} {name if name == HELD_OUT else f'examples of {name}'}"
        alone = found.examples < least and found.counts_as >= ALONE * found.examples
        few = f"{what} are fewer" if alone else f"{what} {counting(found.counts_as)}, fewer"
        remedy = more if name == HELD_OUT else "it more"
        told.append(
            f"{few} than [shadow].min_examples = {least}: no version can be promoted; give {remedy} or lower it"
        )
    return told


def counting(counts_as: float) -> str:
    """Say how many independent examples of equal length others count as."""
    return f"count as {int(counts_as)}, because several ask the same or some answers are much longer"
