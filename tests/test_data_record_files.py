"Derived from nbs/06d_record_files.ipynb by `make tests`; edit the notebook, not this file."
import codecs, json, re
from collections.abc import Iterator
from vlm_lit.core import DataError
import io
from fastcore.test import expect_fail
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.record_files import BLOCK
from vlm_lit.data.record_files import JsonList
from vlm_lit.data.record_files import file_kind
from vlm_lit.data.record_files import scan_records

def test_only_the_record_that_is_parsed_is_held():
    data = '[{"id": "a"},\n {"id": "é"}]'.encode()
    watch = ["self.text", "start", "end", "value"]
    stop = dict(at="if end < size", watch=watch, when="value['id'] == 'é'")
    with Breakpoint(JsonList.value, **stop) as bp:
        found = list(scan_records(io.BytesIO(data), "two.json", block=4))
    assert found == [{"id": "a"}, {"id": "é"}]
    bp.expect({"self.text": '{"id": "é"}]'}, start=0, end=11, value={"id": "é"})

def test_a_number_at_the_end_of_a_block_may_go_on():
    watch = ["self.text", "end", "size", "value"]
    with Breakpoint(JsonList.value, at="if end < size", watch=watch) as bp:
        found = list(scan_records(io.BytesIO(b"[12, 3]"), "numbers.json", block=2))
    assert found == [12, 3]
    bp.expect_each(value=[1, 12, 3, 3], end=[2, 2, 2, 1], size=[2, 3, 2, 2])

def test_a_missing_comma_is_refused_with_its_line():
    text = '[{"id": 1},\n {"id": 2}\n {"id": 3}]'
    with Breakpoint(JsonList.error, at="return _not_json", watch="why self.line i") as bp:
        try: list(scan_records(io.BytesIO(text.encode()), "bad.json"))
        except DataError as error: print(str(error).replace("; ", ";\n"))
    bp.expect(why="expected ',' or ']' after a record")
    bp.expect_return({"str(result)[:16]": "bad.json, line 3"})

def test_files_of_other_kinds_are_named():
    import gzip, io, tarfile, zipfile

    def packed(make):
        out = io.BytesIO()
        make(out)
        return out.getvalue()

    def tar(out):
        with tarfile.open(fileobj=out, mode="w") as file:
            file.addfile(tarfile.TarInfo("a"))

    def zipped(out):
        with zipfile.ZipFile(out, "w") as file: file.writestr("a", "b")

    def image(kind):
        return packed(lambda out: Image.new("RGB", (8, 8)).save(out, kind))

    for name, data, what in [
        ("a.tar", packed(tar), "a tar archive"),
        ("a.zip", packed(zipped), "a zip archive"),
        ("a.json.gz", gzip.compress(b"[]"), "compressed with gzip"),
        *[(f"a.{kind}", image(kind), "an image") for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")],
        ("a.json", b"PAR1" + bytes(9), "a Parquet table; name it .parquet"),
        ("a.json", "[]".encode("utf-16"), "text in UTF-16"),
        ("a.json", b"%PDF-1.7", "a PDF"),
        ("a.csv", b"question,answer\n", "a table in text form"),
        ("a.safetensors", b"\x10" + bytes(7) + b'{"__metadata__":{}}', "weights of a model"),
    ]:
        with expect_fail(DataError, contains=f"{name} is {what}"):
            list(scan_records(io.BytesIO(data), name))
    for name, text in [("a.csv", b"[]"), ("a", b" \n{}"), ("a", b"\xef\xbb\xbf[{}]"), ("a", b"")]:
        assert file_kind(text, name) is None
        list(scan_records(io.BytesIO(text), name))

def test_no_record_is_lost_or_changed_in_any_layout():
    def one_level(inner):
        return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)

    leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.just("\ud83d")
    trees = st.recursive(leaves, one_level, max_leaves=6)
    values = st.dictionaries(st.text(max_size=5), trees, max_size=4)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        st.lists(values, min_size=1, max_size=6),
        st.booleans(),
        st.sampled_from([None, 1, "\t"]),
        st.booleans(),
        st.booleans(),
        st.integers(1, 40),
    )
    def check(records, lines, indent, ascii, bom, block):
        if not ascii:  # UTF-8 has no half characters
            records = json.loads(json.dumps(records, ensure_ascii=False).replace("\ud83d", "x"))
        if lines:
            text = "\r\n".join(json.dumps(r, ensure_ascii=ascii) for r in records) + "\n"
        else:
            text = "\n " + json.dumps(records, indent=indent, ensure_ascii=ascii) + "\n"
        data = codecs.BOM_UTF8 * bom + text.encode("utf-8")
        assert list(scan_records(io.BytesIO(data), "any.json", block)) == records

    check()

def test_broken_files_are_refused_with_their_line():
    good = '{"id": 1, "conversations": []}'
    wrong = {
        good + '\n{"id": 2,\n': "bad.json, line 2: not JSON",
        f"[{good},\n{good},\n": "bad.json, line 3: not JSON",
        f"[{good}\n{good}]": "line 2: not JSON (expected ',' or ']'",
        f"[{good},\n\n{{'id': 3}}]": "line 3: not JSON",
        f"[{good}] x": "line 1: not JSON (text after the list)",
        "[" + good: "line 1: not JSON (the list is not closed",
        "[\n" + "[" * 100_000: "line 2: not JSON (maximum recursion",
        "[\n1" + "0" * 5000 + "]": "line 2: not JSON (Exceeds the limit",
        "{}}": "line 1: not JSON",
    }
    for text, message in wrong.items():
        for block in (5, BLOCK):
            with expect_fail(DataError, contains=message):
                list(scan_records(io.BytesIO(text.encode()), "bad.json", block))
    for text in ('[\n{"id": "%s"}]', '\n{"id": "%s"}'):
        with expect_fail(DataError, contains="bad.json, line 2: not UTF-8"):
            list(scan_records(io.BytesIO((text % "é").encode("latin-1")), "bad.json", 4))
        with expect_fail(DataError, contains="a record of more than 1,000 characters"):
            list(scan_records(io.BytesIO((text % ("x" * 3000)).encode()), "bad.json", 64, 1000))
