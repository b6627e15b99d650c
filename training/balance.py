"""What the captions speak of, how evenly, and weights that even it out: `python -m training.balance --data DIR`.

Counts the words and phrases of each attribute (colours, styles, people, ...) over the pictures, prints a table, and writes weights for
drawing (`--set balance=FILE`): within each attribute every value then comes equally often, among the pictures that name one.
A word in a caption is all that is looked at: a picture nobody described counts for nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from training.checkpoint import write_atomic
from training.config import Config
from training.data.cache import Pixels
from training.data.shards import read_captions
from training.data.sources import groups, is_named, list_shards, parse_mixture

# attribute -> values; a value is a word or phrase, or several that count as one, separated by |
ATTRIBUTES: dict[str, list[str]] = {
    "colour": ["red", "orange", "yellow", "green", "teal|turquoise", "blue", "purple|violet", "pink", "brown", "black", "white", "grey|gray"],
    "style": ["photo|photograph|photorealistic", "painting|oil painting|watercolour|watercolor", "drawing|sketch|line art", "anime|manga", "cartoon|comic",
              "3d|3d render|render", "pixel art", "flat", "noto", "twemoji|twitter"],
    "gender": ["woman|women|girl|girls|female|lady", "man|men|boy|boys|male|gentleman"],
    "age": ["baby|infant|toddler", "child|children|kid|kids|boy|boys|girl|girls", "teenager|teen|young", "middle-aged|adult", "old|older|elderly|senior"],
    "skin": ["light skin|pale skin|light skin tone", "medium-light skin|medium-light skin tone", "medium skin|olive skin|tan skin|medium skin tone",
             "medium-dark skin|brown skin|medium-dark skin tone", "dark skin|black skin|dark skin tone"],
    "count": ["one|single", "two|pair|couple", "three", "four", "five", "many|several|group|crowd"],
    "light": ["day|daylight|sunny", "night|dark", "sunset|sunrise|dusk|dawn"],
    "view": ["close-up|closeup|portrait", "full body|full-body", "aerial|bird's eye|from above", "landscape|wide"],
}
CAP = 10.0  # no picture is drawn more than this many times as often, or as rarely, as before


def parse_attributes(text: str, name: str) -> dict[str, list[str]]:
    """A JSON object {"colour": ["red", "grey|gray"]}, or lines `colour: red, grey|gray`. ValueError names the broken line."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name}: not JSON: {error}") from error
        if not all(isinstance(v, list) and v and all(isinstance(w, str) and w for w in v) for v in found.values()):
            raise ValueError(f'{name}: wanted {{"colour": ["red", "grey|gray"], ...}}')
        return found
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            attribute, colon, values = line.partition(":")
            words = [v.strip() for v in values.split(",") if v.strip()]
            if not colon or not words:
                raise ValueError(f"{name}, line {number}: {line!r}: wanted `attribute: value, value|synonym`")
            found[attribute.strip()] = words
    return found


def tell(captions: list[list[str]], attributes: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Which pictures name which value in any of their captions: attribute -> bool [N, values].

    Within an attribute a longer phrase hides the shorter one in it: "medium-dark skin tone" is no "dark skin tone".
    """
    found = {}
    for attribute, values in attributes.items():
        words = {word for value in values for word in value.lower().split("|")}
        owners = {word: [i for i, value in enumerate(values) if word in value.lower().split("|")] for word in words}  # a boy is male and a child
        pattern = re.compile(r"(?<![\w-])(" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + r")(?![\w-])", re.IGNORECASE)
        table = np.zeros((len(captions), len(values)), bool)
        for row, texts in enumerate(captions):
            for word in pattern.findall("\n".join(texts)):
                table[row, owners[word.lower()]] = True
        found[attribute] = table
    return found


def even_weights(tables: dict[str, np.ndarray], least: int = 2, rounds: int = 200, cap: float = CAP) -> np.ndarray:
    """Weights [N] of mean 1 under which each value of an attribute has the same total: iterative proportional fitting.

    A round goes through the attributes; each picture's weight is multiplied by the geometric mean of what its values lack. Values
    that fewer than `least` pictures name are left as they are. Weights stay within a factor `cap` of 1: what is too rare stays so.
    """
    weights = np.ones(len(next(iter(tables.values()))))
    for _ in range(rounds):
        before = weights.copy()
        for table in tables.values():
            table = table[:, table.sum(0) >= least].astype(float)
            if table.shape[1] < 2:
                continue
            totals = weights @ table
            factor = np.log(totals.mean() / totals)
            named = table.sum(1)
            weights *= np.exp(np.divide(table @ factor, named, out=np.zeros_like(named), where=named > 0))
        weights = np.clip(weights / weights.mean(), 1 / cap, cap)
        if np.abs(weights / before - 1).max() < 1e-6:
            break
    return weights / weights.mean()


def report(tables: dict[str, np.ndarray], attributes: dict[str, list[str]], weights: np.ndarray) -> str:
    """A table: pictures that name each value, their share among those that name one, and the share with the weights."""
    lines = []
    for attribute, table in tables.items():
        counts, resampled = table.sum(0), weights @ table
        lines.append(f"{attribute}: named by {int(table.any(1).sum())} of {len(table)} pictures")
        for value, count, total in zip(attributes[attribute], counts, resampled):
            if count:
                lines.append(f"  {value.split('|')[0]:24}{count:8}  {count / counts.sum():7.1%}  -> {total / resampled.sum():7.1%}")
    return "\n".join(lines)


def by_name(names: list[tuple[str, str]], weights: np.ndarray) -> dict[str, dict]:
    """`weights`: key -> weight, of the keys that only one data set has; `sets`: data set -> key -> weight, of the others. `names`: (data set, key).

    Numbered pictures have the same keys in every folder. Where keys differ no path is written, so that the data may be moved.
    """
    owners = Counter(key for _, key in names)
    found: dict[str, dict] = {"weights": {}, "sets": {}}
    for (spec, key), weight in zip(names, np.round(weights, 6).tolist()):
        (found["weights"] if owners[key] == 1 else found["sets"].setdefault(spec, {}))[key] = weight
    return found


def load_weights(path: str, keys: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Data set -> key of a picture -> its weight, for data sets with those `keys`. ValueError says what was wanted, and where a weight
    could be that of several pictures."""
    place = lambda spec: spec if is_named(spec) else str(Path(spec).resolve())
    try:
        content = json.loads(Path(path).read_text())
        plain, sets = content["weights"], {place(spec): dict(found) for spec, found in content.get("sets", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"balance={path!r}: {error!r}; wanted the file that `python -m training.balance --data DIR` writes") from error
    anew = "write it anew: python -m training.balance --data, with all data sets of this training as they are named here"
    shared = {key for found in sets.values() for key in found}
    owners: dict[str, str] = {}
    weights: dict[str, dict[str, float]] = {}
    for spec, of_set in keys.items():
        own = sets.get(place(spec), {})
        for key in of_set:
            if key in own:
                continue
            if key in shared:
                raise ValueError(f"balance={path!r} has weights for {key} of {', '.join(p for p in sets if key in sets[p])}, but not of {spec}: {anew}")
            if key in plain and owners.setdefault(key, spec) != spec:
                raise ValueError(f"balance={path!r} has one weight for {key}, which is a picture of {owners[key]} and another one of {spec}: {anew}")
        weights[spec] = {key: own.get(key, plain.get(key)) for key in of_set if key in own or key in plain}
    return weights


def row_weights(pixels: Pixels, config: Config, balance: dict[str, float] | None) -> np.ndarray:
    """How often each picture is drawn, [N], not normalised; all augmented rows of a picture weigh alike. ValueError when the balance
    is of other pictures."""
    weights = np.array([config.toned_weight if m.get("toned") else 1.0 for m in pixels.meta])
    if balance is None:
        return weights
    known = [k in balance for k in pixels.keys]
    if not any(known):
        raise ValueError(f"balance={config.balance!r} knows none of the pictures, such as {pixels.keys[:1]}: it was made of other data")
    return weights * np.array([balance.get(k, 1.0) for k in pixels.keys])


def read(data: str, split: str) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """(data set, key) and captions of all samples; pictures are not decoded, and broken samples are left to the training to name."""
    names, captions = [], []
    for spec in dict.fromkeys(spec for spec, _ in parse_mixture(data)):
        for shard in list_shards(spec, split):
            for key, files in groups(shard):
                try:
                    found, _ = read_captions(key, files) if isinstance(files, dict) else ([], {})
                except ValueError:
                    continue
                if found:
                    names.append((spec, key))
                    captions.append(found)
    if not names:
        raise ValueError(f"{data}: no sample with a caption in the split {split}")
    (spec, key), count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{spec} has {count} samples named {key}, in different shards: weights are told apart by name, so give each its own")
    return names, captions


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.balance", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="as in the recipe: a folder, shards, URLs, or a mixture")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--attributes", type=Path, help="file with lines `colour: red, grey|gray`, or JSON; default: a built-in list")
    parser.add_argument("--even", default="", help="attributes to even out, comma-separated (default: all)")
    parser.add_argument("--least", type=int, default=5, help="leave alone what fewer pictures name (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("balance.json"), help="where the weights go (default: %(default)s)")
    args = parser.parse_args()
    try:
        attributes = parse_attributes(args.attributes.read_text(encoding="utf-8"), str(args.attributes)) if args.attributes else ATTRIBUTES
        wanted = [a.strip() for a in args.even.split(",") if a.strip()] or list(attributes)
        if set(wanted) - set(attributes):
            raise ValueError(f"--even {args.even!r}: wanted some of {', '.join(attributes)}")
        names, captions = read(args.data, args.split)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    tables = tell(captions, attributes)
    weights = even_weights({a: tables[a] for a in wanted}, args.least)
    print(report(tables, attributes, weights))
    content = {"data": args.data, "even": wanted, **by_name(names, weights)}
    write_atomic(args.out, lambda file: file.write((json.dumps(content) + "\n").encode()))
    print(f"weights from {weights.min():.3g} to {weights.max():.3g} written to {args.out}: --set balance={args.out}")


if __name__ == "__main__":
    main()
