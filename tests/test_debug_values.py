"Derived from nbs/93_values.ipynb by `make tests`; edit the notebook, not this file."
import base64, io, itertools, re
from typing import NamedTuple
import numpy as np
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, describe
from vlm_lit.debug.snapshots import Note, failure
import torch
from PIL import Image
from fastcore.test import test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.debug.values import as_ids
from vlm_lit.debug.values import as_image
from vlm_lit.debug.values import ids_text
from vlm_lit.debug.values import shown
from vlm_lit.debug.values import thumbnail
from vlm_lit.debug.values import visible
from vlm_lit.debug.values import visible_spaces

def setup_module():
    global broken, image, tok
    tok = load_tokenizer("gemma")
    image = torch.linspace(-1.79, 2.15, 3 * 24 * 24).reshape(3, 24, 24)
    broken = image.clone()
    broken[0, 0, :4] = float("nan")

def test_unprintable_characters_and_edges_are_visible():
    for text in ["What is in the photo?\n", "user: ", "a  b", "\x1b[31mred", "\u202etxt.exe"]:
        print(visible_spaces(text))
    test_eq(visible_spaces("user: "), "user:·")
    test_eq(visible_spaces("a  b c\n d"), "a··b c⏎·d")
    test_eq(visible("\x1b[31m\u202e"), "\\x1b[31m\\u202e")

def test_ids_are_written_with_their_tokens():
    ids = [2, 106, 1645, 108, -200, 108, 1841, 603]
    print(ids_text(ids, tok))
    print(ids_text([-100] * 17 + [1175, 3741], tok))
    test_eq(ids_text(ids, tok).split()[:3], ["<bos>=2", "<start_of_turn>=106", "user=1645"])
    test_eq(ids_text(ids, tok).split()[3:], ["⏎=108", "<image>=-200", "⏎=108", "What=1841", "▁is=603"])
    test_eq(ids_text([-100] * 17 + [1175], tok), "-100×17 the=1175")
    test_eq(ids_text([[2, 106], [2]], tok), "[<bos>=2 <start_of_turn>=106]  [<bos>=2]")
    test_eq(ids_text([10**9], tok), "1000000000")  # an id that the tokenizer does not have

def test_ids_are_known_by_name_and_elements():
    named = ["input_ids", "labels[0]", "batch['labels']", "self.prompt_chunks", "total"]
    print([name for name in named if as_ids(name, [1, 2])])
    test_eq([name for name in named if as_ids(name, [1, 2])], named[:4])
    test_eq(as_ids("labels", torch.tensor([[1, 2]])), [[1, 2]])
    for value in [torch.ones(2), ["a"], [1, [2]], [True], 3, torch.zeros(1, 1, 1, dtype=torch.long)]:
        test_eq(as_ids("input_ids", value), None)

def test_tensors_are_summarized():
    for value in [image, broken, torch.tensor([0.5, 1.5]), "two  spaces", object()]:
        print(*shown("value", value), sep=" | ")
    test_eq(shown("x", image), ("(3, 24, 24)", "float32", "min -1.79  mean 0.18  max 2.15"))
    assert shown("x", broken).text.endswith("max 2.15, 4 of 1728 not finite")
    test_eq(shown("x", torch.full((9,), torch.inf)).text, "9 of 9 not finite")
    test_eq(shown("x", object()).text, "<object object>")
    assert shown("x", image.half().numpy()).text.startswith("min -1.79")
    test_eq(shown("x", [torch.ones(2, 2)]).text, "[tensor([[1., 1.], [1., 1.]])]")
    test_eq(shown("x", Note("ValueError: a\x1b[31m\nb")).text, "<ValueError: a\\x1b[31m⏎b>")

def test_images_become_thumbnails():
    class Html:
        def __init__(self, text): self.text = text

        def _repr_html_(self): return self.text

    red = Image.new("RGB", (200, 100), "red")
    test_eq(as_image(image).size, (24, 24))
    assert 'width="96" height="48"' in thumbnail(red, "a red image")
    test_eq([thumbnail(x, "") for x in (torch.ones(3, 8, 8), torch.ones(24, 24), "text")], [""] * 3)
    assert as_image(broken) is not None
    Html(thumbnail(image, "a gradient"))

def test_shown_is_stopped_where_it_summarizes():
    with Breakpoint(shown, at="text = statistics(value)", watch="name shape kind value") as bp:
        shown("pixels", image)
    bp.expect(name="pixels", shape="(3, 24, 24)", kind="float32")
