"""Pages have the tables and pictures of what is in results/."""

import json
import math
import re

import pytest
from matplotlib import image
from matplotlib import pyplot as plt

import nsa_fsa
from benchmarks import pages, pictures, tables
from benchmarks.pages import PAGES, TABLE
from benchmarks.published import FOLDER, GPU, read, rows_of

TEXTS = {path.name: path.read_text() for path in PAGES}
NAMES = {name: TABLE.findall(text) for name, text in TEXTS.items()}
QUOTED = [name for found in NAMES.values() for name, _ in found]
PICTURES = {path.name for path in FOLDER.glob("*.png")}


# Tables


@pytest.mark.parametrize("page", TEXTS)
def test_every_table_is_that_of_the_results(page):
    assert NAMES[page]
    assert pages.fill(TEXTS[page]) == TEXTS[page], "Fix: python -m benchmarks pages"


def test_every_table_has_its_place():
    public = {"against_full", "crossover", "shares", "rates", "of_floor", "table_7", "memory"}
    public |= {"how_fast", "speed_up_ranges", "decoding", "table_9", "table_10", "prompts"}
    public |= {"generation", "serving", "same_tokens", "shared_sequences"}
    assert set(QUOTED) == public


def test_a_table_that_is_out_of_date_is_written_again():
    text = TEXTS["README.md"].replace("31.7 / 57.0", "1.7 / 7.0")
    assert text != TEXTS["README.md"]
    assert pages.fill(text) == TEXTS["README.md"]


def test_pages_are_written_where_they_changed(tmp_path, monkeypatch):
    paths = [tmp_path / "a.md", tmp_path / "b.md"]
    paths[0].write_text("free\n" + pages.BEGIN.format("rates") + "\n" + pages.END + "\nfree\n")
    paths[1].write_text("nothing to write\n")
    monkeypatch.setattr(pages, "PAGES", paths)
    assert pages.write() == paths[:1]
    assert pages.write() == []
    lines = paths[0].read_text().splitlines()
    assert (lines[0], lines[-1]) == ("free", "free")
    assert "| large bfloat16 product | large copy |" in lines


def test_numbers_have_three_digits():
    assert [tables.ms(x) for x in (0.194, 2.5, 12.34, 119.6, 1172.4)] == [
        "0.194",
        "2.50",
        "12.3",
        "120",
        "1,172",
    ]
    assert tables.between([0.612, 0.64, 0.63]) == "61 to 64%"
    assert tables.between([0.751, 0.749]) == "75%"
    assert tables.between([0.92, 1.04], ".1f", "") == "0.9 to 1.0"


def test_a_cell_of_every_table_by_hand():
    """As the rows have it, by another way than through pandas."""
    rows = read("core")["rows"]
    keys = ("num_tokens", "group_size", "implementation", "pass")
    ms = {tuple(row[x] for x in keys): row["ms"] for row in rows}
    line = tables.against_full().iloc[2]
    assert line.tokens == "32,768"
    forward, backward = (ms[32768, 4, "nsa_fsa", x] for x in ("forward", "backward"))
    assert line["NSA, G = 4"] == f"{forward:.1f} / {backward:.1f}"
    both = (ms[32768, 4, name, "forward_backward"] for name in ("flash_attn_4", "nsa_fsa"))
    slow, fast = both
    assert line.iloc[5].split(", ")[1] == f"{slow / fast:.2f}"
    branches = {tuple(r[x] for x in keys): r for r in read("core_branches")["rows"]}
    floors = [branches[65536, g, "select_blocks", "forward"]["of_floor"] for g in (1, 4, 16)]
    found = tables.of_floor().set_index("floor / time").loc["block selection"]
    low, high = (f"{100 * x:.0f}" for x in (min(floors), max(floors)))
    assert found["65,536, forward"] == f"{low} to {high}%"
    parts = [branches[8192, 4, x, "backward"]["ms"] for x in tables.PARTS if x != "select_blocks"]
    share = branches[8192, 4, "selected_attention", "backward"]["ms"] / sum(parts)
    low, high = tables.shares()["selected attention"][1].removesuffix("%").split(" to ")
    assert int(low) <= round(100 * share) <= int(high)
    first = {(x["pass"], x["group_size"]): x["tokens"] for x in read("crossover")["crossovers"]}
    assert tables.crossover()["G = 1"][0] == f"{first['forward_backward', 1]:,} tokens"


def test_the_papers_table_is_quoted_as_it_was():
    """Earlier code wrote the paper's seconds into each row."""
    quoted = tables.PAPER.set_index(["block_size", "group_size", "num_tokens"])
    assert len(quoted) == 16
    rows = read("core_table7")["rows"]
    for row in rows:
        here = quoted.loc[row["block_size"], row["group_size"], row["num_tokens"]]
        assert here.num_blocks == row["num_blocks"]
        found = {who.lower(): here[f"{who}_{row['pass']}"] for who in ("FSA", "NSA", "full")}
        assert found == row["paper_s"]
        assert row["ms"] / 1e3 < found["fsa"]
    assert len(rows) == 32
    # As the paper's text has it: FSA is at most 1.86 and 2.55 times as fast as NSA.
    assert (quoted.NSA_forward / quoted.FSA_forward).max() == pytest.approx(1.86, abs=0.02)
    both = quoted.NSA_forward_backward / quoted.FSA_forward_backward
    assert both.max() == pytest.approx(2.55, abs=0.01)


# Pictures and links


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXTS[page.name])
    assert links
    assert all((page.parent / link).exists() for link in links)


@pytest.fixture(scope="module")
def grids():
    """The panels of every picture, by its name."""
    drawn = (x for suite, draw in pictures.PICTURES.items() for x in draw(read(suite)))
    yield {name: grid for name, grid, _ in drawn}
    plt.close("all")


def test_every_picture_is_shown_and_drawn(grids):
    shown = {x for text in TEXTS.values() for x in re.findall(r"results/([\w.]+\.png)", text)}
    assert shown == PICTURES == {f"{name}_{GPU}.png" for name in grids}


def test_a_picture_is_a_file_beside_the_results(tmp_path):
    name = f"crossover_{GPU}"
    (tmp_path / f"{name}.json").write_bytes((FOLDER / f"{name}.json").read_bytes())
    (path,) = pictures.draw("crossover", GPU, tmp_path)
    assert path == tmp_path / f"{name}.png"
    size = image.imread(path).shape[:2]
    assert size == pytest.approx(image.imread(FOLDER / path.name).shape[:2], rel=0.1)
    assert pictures.draw("core_memory") == []


def points(ax):
    """Of every line."""
    return [list(zip(*line.get_data(), strict=True)) for line in ax.lines if len(line.get_xdata())]


def test_the_picture_of_the_core(grids):
    """The speed-up is over the faster full attention."""
    rows = rows_of("core")
    axes = grids["core"].axes_dict
    assert len(axes) == 9
    rows = rows[rows.group_size == 4].sort_values("num_tokens")

    def ms(implementation, name):
        here = rows[(rows.implementation == implementation) & (rows["pass"] == name)]
        return dict(zip(here.num_tokens, here.ms, strict=True))

    assert list(ms("nsa_fsa", "forward").items()) in points(axes["forward", 4])
    for name in ("forward", "forward_backward"):
        ours, *full = (ms(x, name) for x in ("nsa_fsa", "flash_attn_4", "cudnn"))
        gain = [min(x[tokens] for x in full) / time for tokens, time in ours.items()]
        lines = points(axes["speed-up", 4])
        assert any([y for _, y in line] == pytest.approx(gain) for line in lines)


def test_the_picture_of_the_crossover(grids):
    axes = grids["crossover"].axes_dict
    assert set(axes) == {"forward", "both passes"}
    for entry in read("crossover")["crossovers"]:
        line = [(int(tokens), ratio) for tokens, ratio in entry["ratios"].items()]
        assert line in points(axes[pictures.PASSES[entry["pass"]]])


def test_the_picture_of_the_parts(grids):
    rows = rows_of("core_branches")
    for (name, tokens), ax in grids["parts"].axes_dict.items():
        here = rows[(rows["pass"] == name) & (rows.num_tokens == tokens)]
        parts = here[here.implementation != "nsa_fsa"]
        tops = {round(bar.get_x() + bar.get_width() / 2): 0.0 for bar in ax.patches}
        for bar in ax.patches:
            place = round(bar.get_x() + bar.get_width() / 2)
            tops[place] = max(tops[place], bar.get_y() + bar.get_height())
        sums = parts.groupby("group_size").ms.sum().sort_index()
        assert [tops[place] for place in sorted(tops)] == pytest.approx(list(sums))
        heights = {round(bar.get_height(), 4) for bar in ax.patches if bar.get_height()}
        assert {round(x, 4) for x in parts.ms} == heights
        whole = here[here.implementation == "nsa_fsa"].sort_values("group_size").ms
        assert [x.get_segments()[0][0][1] for x in ax.collections] == pytest.approx(list(whole))


@pytest.mark.parametrize("tokens", [8192, 65536])
def test_the_pictures_of_the_floors(grids, tokens):
    rows = rows_of("core_branches")
    for (name, group), ax in grids[f"floors_{tokens}"].axes_dict.items():
        here = rows[(rows["pass"] == name) & (rows.num_tokens == tokens)]
        here = here[here.group_size == group]
        widths = {round(bar.get_width(), 6) for bar in ax.patches if bar.get_width() > 0}
        assert {round(x, 6) for x in (*here.ms, *here.floor_ms)} <= widths
        assert {text.get_text() for text in ax.texts} == {f" {x:.0%}" for x in here.of_floor}


def test_the_picture_of_selected_attention(grids):
    rows = rows_of("selected")
    axes = grids["selected"].axes_dict
    assert {tokens for _, tokens in axes} == {8192, 65536}  # where there is something beside ours
    here = rows[(rows.implementation == "triton_query_major") & (rows["pass"] == "backward")]
    here = here[here.num_tokens == 65536].sort_values("group_size")
    assert list(zip(here.group_size, here.ms, strict=True)) in points(axes["backward", 65536])


def test_what_a_patched_layer_costs():
    """The table of a page that is written by hand."""
    path = FOLDER / "patched_nvidia_h200.json"
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["pass"] == "forward_backward":
            case = (row["num_tokens"], row["group_size"])
            found.setdefault(case, {})[row["implementation"]] = row["ms"]
    page = (FOLDER.parents[1] / "docs/lab/patched_models.md").read_text()
    for (tokens, group), ms in found.items():
        alone, patched = ms["nsa_layer"], ms["patched_layer"]
        line = f"| {tokens:,} | {group} | {alone:.2f} | {patched:.2f} | {patched / alone:.2f} |"
        assert line in page.splitlines()
        assert patched < 1.02 * alone


def test_the_tables_of_serving_are_what_was_measured():
    """Each model's figures in its own column, and how many times as fast ours is."""
    table = {line[0]: line[1:] for line in tables.serving().values.tolist()}
    row = {(x["implementation"], x["pass"], x["num_tokens"]): x for x in read("serving")["rows"]}
    names = ("dense", "nsa_fsa")
    rate = [row[name, "decode", 65536]["tokens_per_s"] for name in names]
    first = [row[name, "first_token", 65536]["ms"] for name in names]
    found = table["new tokens/s while 8 requests of 65,536 tokens all decode"]
    assert found == [f"{rate[0]:,.0f}", f"{rate[1]:,.0f}", f"{rate[1] / rate[0]:.2f} times"]
    found = table["ms to the first token of 65,536, alone"]
    assert found == [f"{first[0]:,.0f}", f"{first[1]:,.0f}", f"{first[0] / first[1]:.2f} times"]

    same = tables.same_tokens()
    entries = [x for y in ("serving_float32", "serving") for x in read(y)["agreement"]]
    for name, key in (("vLLM", "agreement"), ("transformers", "agreement_of_transformers")):
        assert same[name].tolist() == [f"{x[key]:.1%}" for x in entries]


def test_the_table_of_several_gpus_is_what_was_measured():
    """One group of heads on two GPUs beside one GPU."""
    row = {
        (x["pass"], x["num_tokens"], x["num_heads"], x.get("groups")): x["ms"]
        for x in read("distributed")["rows"]
    }
    alone, shared = row["alone", 262144, 32, None], row["shared", 262144, 32, 1]
    (line,) = (x for x in tables.shared_sequences().values.tolist() if x[1] == "262,144")
    assert line[2:] == [f"{alone:.0f}", 2, f"{shared:.0f}", f"{alone / shared / 2:.1%}"]


@pytest.mark.parametrize("group_size", [4, 16])
def test_where_decoding_breaks_even_is_what_was_measured(group_size):
    """`explain` says it by a fit; the measured length lies between two lengths of the suite."""
    rows = rows_of("decode")
    here = (rows.batch_size == 1) & (rows.group_size == group_size)
    fastest = (
        rows[here]
        .pivot_table(index="num_tokens", columns="kind", values="ms", aggfunc="min")
        .dropna()
    )
    ours_wins = fastest.ours < fastest.full
    longer = fastest[ours_wins].index.min()
    shorter = fastest[~ours_wins].index.max()
    low, high = (math.log(fastest.full[x] / fastest.ours[x]) for x in (shorter, longer))
    measured = shorter * (longer / shorter) ** (low / (low - high))
    heads, width = map(int, rows[here][["num_heads", "head_dim"]].iloc[0])
    config = nsa_fsa.NSAConfig(
        hidden_size=heads * width, num_heads=heads, num_kv_heads=heads // group_size, head_dim=width
    )
    said = re.search(r"about ([\d,]+) tokens of one", str(nsa_fsa.explain(config, 1, gpu="h200")))
    assert float(said[1].replace(",", "")) == pytest.approx(measured, rel=0.25)
