"""The tables of finished runs, and the pages that show them; run: python benchmarks/retrieval_tables.py.

Writes the tables of the pages anew from benchmarks/results/retrieval and finetuning: what stands between
``<!-- table NAME -->`` and ``<!-- end of table -->``. A test fails where a page differs from that.
"""

import re
from pathlib import Path

import finetuning_rows
import numpy as np
import retrieval_rows
import run_files
from harness import make_parser, markdown_table
from scipy import stats

METRICS = {
    "precision_at_1": "P@1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "MAP@R",
    "NMI": "NMI",
}
COMPARED = {"precision_at_1": "P@1", "mean_average_precision_at_r": "MAP@R"}
SOON = "epochs to 95%"
TUNED_FOR = "mean_average_precision_at_r"
BASELINE = "multi_similarity"
KINDS = {
    "test": "",
    "long": ", longer trainings",
    "validation": ", validation classes",
    "halves": ", half of the training classes",
}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(
    ROOT / name for name in ("docs/retrieval.md", "docs/photographs.md", "docs/photographs_choices.md", "README.md")
)
OF_PML = ("contrastive", "triplet", "multi_similarity", "proxy_anchor", "cosface", "normalized_softmax")
"""The rows with one of PML's losses alone, tuned as the page of the data says."""
MARKED = re.compile(r"(<!-- table ([^\n]+?) -->\n\n)(?:\|[^\n]*\n)*(\n<!-- end of table -->)")


OF_EACH = {
    "numbers of the embedding in use": "dimensions in use",
    "cosine between two images": "cosine of two images",
    "gradient of the pair loss / of the proxy loss": "gradient, pairs / proxies",
    "cosine between the two": "cosine of the gradients",
}
"""What benchmarks/finetuning.py measures in all rows, or in all hybrids, and the columns that show it."""


def collect(out, kind="test", rows_of=retrieval_rows):
    """Return data set -> row -> seed -> run, a run being metrics, and the settings that were chosen for it.

    Of what is computed from a row's embeddings only what a question names. ``rows_of``: has ROWS and QUESTIONS.
    """
    asked = {row for pairs in rows_of.QUESTIONS.values() for pair in pairs for row in pair}
    by_data = {}
    for data, path in run_files.paths_of(out, kind).items():
        rows = {}
        for run in run_files.read(path):
            names = () if run.get("loss") == [] else ("lr", *run["tuned"])  # of what was trained
            chosen = {name: run["settings"][name] for name in names}
            for suffix, metrics in run["metrics"].items():
                if not suffix or run["row"] + suffix in asked:
                    seeds = rows.setdefault(run["row"] + suffix, {})
                    seeds.setdefault(run["seed"], metrics | {"chosen": chosen} | soon_good(run))
        by_data[data] = dict(sorted(rows.items(), key=lambda item: place(item[0], rows_of.ROWS)))
    return by_data


def soon_good(run):
    """Return after how many epochs MAP@R was 95% of the run's best, where it is known for each epoch."""
    epochs = run.get("epochs")  # of former benchmarks, their number
    values = epochs.get(TUNED_FOR) if isinstance(epochs, dict) else None
    return {SOON: next(i for i, x in enumerate(values, 1) if x >= 0.95 * max(values))} if values else {}


def place(row, rows):
    """Return where a row stands: in the order of ``rows``, then those with settings of their own by name."""
    names, name = list(rows), row.split(" + ")[0]
    return (names.index(name), "") if name in names else (len(names), name)


def mean_and_deviation(values, digits=1):
    deviation = f" ({np.std(values, ddof=1):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def difference(row, baseline, metric):
    """Return mean and half width of the 95% interval of the difference, paired by seed; None for fewer than two."""
    seeds = sorted(set(row) & set(baseline))
    if len(seeds) < 2:
        return None
    gaps = np.array([row[seed][metric] - baseline[seed][metric] for seed in seeds])
    return gaps.mean(), stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5


def with_interval(gap):
    return "" if gap is None else f"{gap[0]:+.1f} ± {gap[1]:.1f}"


def tables_of_rows(out, baseline=BASELINE, rows_of=retrieval_rows, kinds=tuple(KINDS)):
    """Return name -> (title, table): the rows of each data set, and the questions that they answer."""
    tables = {}
    for kind in kinds:
        for data, rows in collect(out, kind, rows_of).items():
            name, title = f"{data}-{kind} ", f"{data}{KINDS[kind]}"
            tables |= tables_of_some(name, title, rows, rows, rows_of.QUESTIONS, baseline)
    return tables


def tables_of_some(name, title, shown, rows, questions, baseline=BASELINE):
    """Return name -> (title, table): the rows that are shown, and the questions that all rows answer."""
    described = f"percent, mean (standard deviation) over seeds; difference to {baseline}: 95% interval"
    tables = {f"{name}rows": (f"{title}: {described}", table_of_rows(shown, baseline))}
    if answered := table_of_questions(rows, questions):
        described = "differences, mean and 95% interval over seeds, in percent points"
        tables[f"{name}questions"] = f"{title}: {described}", answered
    return tables


def tables_of_finetuning(out):
    """Return name -> (title, table); on test classes, rows with settings of their own have tables of their own."""
    tables = {}
    for kind in ("test", "long"):
        for data, rows in collect(out, kind, finetuning_rows).items():
            name, title = f"{data}-{kind} ", f"{data}{KINDS[kind]}"
            named = {row: seeds for row, seeds in rows.items() if not is_variant(row)}
            tables |= tables_of_some(name, title, named, named, finetuning_rows.QUESTIONS)
            if len(named) < len(rows):
                variants = {row: rows[row] for row in rows if row == "recommended" or is_variant(row)}
                asked = {
                    question: [pair for pair in pairs if any(map(is_variant, pair))]
                    for question, pairs in finetuning_rows.QUESTIONS.items()
                }
                tables |= tables_of_some(f"{name}variant ", f"{title}, other settings", variants, rows, asked)
    tables |= tables_of_rows(out, rows_of=finetuning_rows, kinds=("validation", "halves"))
    return tables | tables_of_measured(out) | tables_of_trials(out)


def is_variant(row):
    """Whether a row has settings of its own, as in "recommended:pair_weight=1"."""
    return ":" in row


def table_of_rows(rows, baseline):
    lines = []
    soon = any(SOON in metrics for seeds in rows.values() for metrics in seeds.values())
    for row, seeds in rows.items():
        values = [mean_and_deviation([metrics[metric] for metrics in seeds.values()]) for metric in METRICS]
        if soon:
            epochs = [metrics[SOON] for metrics in seeds.values() if SOON in metrics and " + " not in row]
            values.append(f"{np.mean(epochs):.1f}" if epochs else "")
        gap = difference(seeds, rows.get(baseline, {}), TUNED_FOR) if row != baseline else None
        chosen = next(iter(seeds.values()))["chosen"]
        named = [f"{name} {value}" if value is None else f"{name} {value:g}" for name, value in chosen.items()]
        settings = "" if " + " in row else ", ".join(named)
        lines.append([shorter(row), str(len(seeds)), *values, with_interval(gap), settings])
    columns = ["row", "seeds", *METRICS.values(), *([SOON] if soon else []), "MAP@R, difference", "chosen"]
    told = [number for number in range(len(columns)) if any(line[number] for line in lines)]
    return markdown_table([columns[i] for i in told], [[line[i] for i in told] for line in lines])


def shorter(row):
    """Return a row as tables show it."""
    begun = next((x for x in finetuning_rows.SHORTER if row.startswith(f"{x},")), None)
    return row if begun is None else f"{finetuning_rows.SHORTER[begun]} {row.removeprefix(f'{begun},')}"


def table_of_questions(rows, questions):
    """Return the table, empty where no question has both of its rows with two seeds."""
    lines = []
    for question, pairs in questions.items():
        for row, other in pairs:
            gaps = [difference(rows.get(row, {}), rows.get(other, {}), metric) for metric in COMPARED]
            if None not in gaps:
                lines.append([question, shorter(row), shorter(other), *map(with_interval, gaps)])
    return markdown_table(["question", "row", "less", *COMPARED.values()], lines) if lines else ""


def tables_of_trials(out):
    """Return name -> (title, table): what the trials of each row have found on validation classes, with one seed."""
    tables = {}
    for data, path in run_files.paths_of(out, "tuning").items():
        runs = run_files.read(path)
        runs.sort(key=lambda run: (place(run["row"], finetuning_rows.ROWS), str(run["trial"])))
        lines = [
            [run["row"], ", ".join(f"{name} {value}" for name, value in run["trial"].items())]
            + [f"{run['metrics'][''][metric]:.1f}" for metric in COMPARED]
            for run in runs
        ]
        tables[f"{data}-tuning trials"] = (
            f"{data}: trials on validation classes, percent",
            markdown_table(["row", "trial", *COMPARED.values()], lines),
        )
    return tables


def tables_of_causes(out):
    """Return name -> (title, table): what benchmarks/retrieval_causes.py has measured, by data set and epochs."""
    tables = {}
    for data, path in run_files.paths_of(out, "causes").items():
        by_epochs = {}
        for run in run_files.read(path):
            rows = by_epochs.setdefault(run["epochs"], {})
            rows.setdefault(run["row"], {}).setdefault(run["seed"], run["measured"])
        for epochs, rows in sorted(by_epochs.items()):
            title, table = table_of_measured(data, rows)
            tables[f"{data}-causes epochs {epochs}"] = f"{title}, epochs: {epochs}", table
    return tables


def tables_of_measured(out):
    """Return name -> (title, table): what benchmarks/finetuning.py has measured in networks, and in parts of them."""
    tables = {}
    for data, path in run_files.paths_of(out, "test").items():
        rows, parts = {}, {}
        for run in run_files.read(path):
            of_seed = run.get("measured", {})
            for found, chosen in ((rows, True), (parts, False)):
                some = {name: value for name, value in of_seed.items() if (name in OF_EACH) == chosen}
                if some:
                    found.setdefault(run["row"], {}).setdefault(run["seed"], some)
        if rows:
            tables[f"{data}-test measured"] = table_of_each(data, rows)
        if parts:
            tables[f"{data}-test parts"] = table_of_measured(data, parts)
    return tables


def table_of_each(data, rows):
    """Return title and table with a line for each row, and a column for each measure of OF_EACH."""
    lines = []
    for row, seeds in rows.items():
        values = [[found[name] for found in seeds.values() if name in found] for name in OF_EACH]
        lines.append([shorter(row), str(len(seeds)), *(mean_and_deviation(x, 2) if x else "" for x in values)])
    return f"{data}: mean (standard deviation) over seeds", markdown_table(["row", "seeds", *OF_EACH.values()], lines)


def table_of_measured(data, rows):
    lines = []
    for row, seeds in rows.items():
        for name in dict.fromkeys(name for measured in seeds.values() for name in measured):
            digits = 1 if "percent" in name or "MAP" in name else 2
            values = [measured[name] for measured in seeds.values() if name in measured]
            lines.append([row, name, mean_and_deviation(values, digits)])
    numbers = " to ".join(str(number) for number in sorted({len(seeds) for seeds in rows.values()}))
    title = f"{data}: mean (standard deviation) over {numbers} seeds"
    return title, markdown_table(["row", "measured", "value"], lines)


def summary(out):
    """Return the table of the README: "recommended" and, for each metric, the best of PML's losses on its seeds."""
    lines = []
    for data, rows in (collect(out / "retrieval") | pretrained(out / "finetuning")).items():
        ours = rows.get("recommended", {})
        of_pml = {row: {x: rows[row][x] for x in ours if x in rows[row]} for row in OF_PML if row in rows}
        of_pml = {row: seeds for row, seeds in of_pml.items() if seeds}
        if of_pml:
            cells = [summary_of(metric, of_pml, ours) for metric in COMPARED]
            numbers = list(dict.fromkeys(number for number, *_ in cells))
            lines.append([data, *(cell for _, *of_metric in cells for cell in of_metric), " and ".join(numbers)])
    columns = [name for metric in COMPARED.values() for name in (f"{metric}: best of PML", "recommended (difference)")]
    title = "recommended, and the best of PML's losses"
    return {"summary": (title, markdown_table(["data", *columns, "seeds"], lines))} if lines else {}


def summary_of(metric, of_pml, ours):
    """Return how many seeds the row has that is best in a metric, its mean and name, and ours with the difference."""
    values = {row: [found[metric] for found in seeds.values()] for row, seeds in of_pml.items()}
    best = max(values, key=lambda row: np.mean(values[row]))
    same = {seed: ours[seed] for seed in of_pml[best]}
    mean = np.mean([found[metric] for found in same.values()])
    gap = with_interval(difference(same, of_pml[best], metric))
    return str(len(same)), f"{np.mean(values[best]):.1f} {best}", f"{mean:.1f}" + (f" ({gap})" if gap else "")


def pretrained(out):
    """Return what ``collect`` does of short and long trainings, and say how long they are."""
    found = []
    for kind in ("test", "long"):
        for data, rows in collect(out, kind, finetuning_rows).items():
            found.append((data, run_files.read(run_files.path_of(out, data, kind))[0]["settings"]["epochs"], rows))
    found.sort(key=lambda one: one[:2])
    return {f"{data}, pretrained, {epochs} epochs": rows for data, epochs, rows in found}


def show(tables):
    for title, table in tables.values():
        print(f"\n{title}\n\n{table}")


def fill(page, tables):
    """Return the text of a page with the tables in their places."""
    names = [name for _, name, _ in MARKED.findall(page)]
    if len(names) != page.count("<!-- table ") or len(names) != page.count("<!-- end of table -->"):
        raise SystemExit(f"every <!-- table NAME --> must be closed behind its table, got that of {', '.join(names)}")
    if unknown := set(names) - set(tables):
        raise SystemExit(f"<!-- table NAME --> must be one of {', '.join(tables)}, got {', '.join(sorted(unknown))}")
    return MARKED.sub(lambda marked: f"{marked[1]}{tables[marked[2]][1]}\n{marked[3]}", page)


def draw(out, path, kind="test", rows_of=retrieval_rows, metrics=(TUNED_FOR,)):
    """Draw every run but those of rows with settings of their own; several metrics beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_data = {
        data: {row: seeds for row, seeds in rows.items() if not is_variant(row)}
        for data, rows in collect(out, kind, rows_of).items()
    }
    if not by_data:
        raise SystemExit(f"--plot needs finished runs, got none under {out}")
    heights = [0.22 * len(rows) + 1.2 for rows in by_data.values()]
    if len(metrics) > 1:
        shape, size, ratios = (len(by_data), len(metrics)), (8 * len(metrics), sum(heights)), heights
    else:
        shape, size, ratios = (1, len(by_data)), (8 * len(by_data), max(heights)), None
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, height_ratios=ratios)
    panels = [(data, rows, metric) for data, rows in by_data.items() for metric in metrics]
    for axis, (data, rows, metric) in zip(axes.flat, panels, strict=True):
        for height, seeds in enumerate(rows.values()):
            values = [found[metric] for found in seeds.values()]
            axis.plot(values, [height] * len(values), "o", color="tab:blue", alpha=0.6, markersize=4)
            axis.plot([np.mean(values)], [height], "k|", markersize=14)
        axis.set_yticks(range(len(rows)), list(rows) if metric == metrics[0] else [], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{data}{KINDS[kind]}: one dot a seed, |: mean")
        axis.set_xlabel(f"{METRICS[metric]} on unseen classes, percent")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def all_tables(out=RESULTS):
    small = out / "retrieval"
    return (
        tables_of_rows(small)
        | tables_of_causes(small)
        | summary(out)
        | {f"finetuning {name}": table for name, table in tables_of_finetuning(out / "finetuning").items()}
    )


def main(pages=PAGES, out=RESULTS):
    """Write the tables of the pages anew."""
    tables = all_tables(out)
    for page in pages:
        page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    make_parser(__doc__).parse_args()
    main()
