"Derived from nbs/06f_record_images.ipynb by `make tests`; edit the notebook, not this file."
import base64, binascii, io, re
from PIL import Image
from vlm_lit.core import DataError
from vlm_lit.text.messages import RECORD_KEYS
from vlm_lit.text.record_forms import CONTENT_KEYS
import json
from fastcore.test import expect_fail, test_eq
from hypothesis import given, settings, strategies as st
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import decode_image
from vlm_lit.text.messages import read_record
from vlm_lit.data.record_images import _Taker
from vlm_lit.data.record_images import take_images

def test_images_inside_records_get_names():
    Image.new("RGB", (4, 3), "red").save(png := io.BytesIO(), "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    rows = [{"image": png.getvalue()}, {"messages": [{"role": "user", "content": [part]}]}]
    with Breakpoint(take_images, at="return plain, taker.images", watch="plain") as bp:
        for n, row in enumerate(rows):
            assert take_images(row, n)[1] == [png.getvalue()]
    named = {"type": "image_url", "image_url": {"url": "embedded:1/0"}}
    wanted = [{"image": "embedded:0/0"}, {"messages": [{"role": "user", "content": [named]}]}]
    bp.expect_each(plain=wanted)

def test_bytes_under_a_text_key_would_become_a_name():
    at, row = "if is_image: return", {"question": b"\x89PNG", "answer": "a"}
    with Breakpoint(_Taker.one, at=at, watch="value is_image", set={"is_image": True}) as bp:
        try: take_images(row)
        except DataError as error: print(error)
    is_refused = lambda found: "holds bytes that are no text" in repr(found)
    bp.expect_changed(result=(is_refused, "embedded:0/0"))

def test_bytes_are_images_text_or_refused():
    P = png.getvalue() if "png" in globals() else b"\x89PNG"
    IN, PICTURE = {"bytes": b"\x89i", "path": None}, Image.new("RGB", (2, 2))
    part = lambda **own: {"messages": [{"role": "user", "content": [own]}]}
    CASES = [  # row, what is left, images; or the error
        ({"image": b"\x89i"}, {"image": "embedded:5/0"}, 1),
        ({"images": [b"\x89i", "x.png", IN]}, {"images": ["embedded:5/0", "x.png", "embedded:5/1"]}, 2),
        ({"image": IN, "texts": []}, {"image": "embedded:5/0", "texts": []}, 1),
        ({"image": {"bytes": None, "path": "x.png"}}, {"image": "x.png"}, 0),
        (part(type="image", image=IN), part(type="image", image="embedded:5/0"), 1),
        (part(type="image", path=b"\x89i"), part(type="image", path="embedded:5/0"), 1),
        (part(type="image", url=bytearray(b"\x89")), part(type="image", url="embedded:5/0"), 1),
        (part(type="text", text=b"\xc3\xa9", image=None), part(type="text", text="é"), 0),
        ({"id": b"a", "answer": b"\xc3\xa9"}, {"id": "a", "answer": "é"}, 0),
        (
            {"image": None, "answer": "data:image/png;base64,AA=="},
            {"answer": "data:image/png;base64,AA=="},
            0,
        ),
        ({"extra": b"\xff", "url": b"\xff"}, {"extra": b"\xff", "url": b"\xff"}, 0),
        ({"id": b"\xff"}, "record 5: column 'id': holds bytes that are no text"),
        ({"id": 3, "answer": b"\xff"}, "record 3: column 'answer': holds bytes that are no text"),
        (part(type="text", text=b"\xff"), "column 'messages': holds bytes that are no text"),
        (part(type="text", url=b"\xff"), "column 'messages': holds bytes that are no text"),
        ({"answer": PICTURE}, "column 'answer': holds an image, and is not for images"),
        ({"question": IN}, "column 'question': holds an image, and is not for images"),
        ({"id": {"bytes": None, "path": "x.png"}}, "column 'id': holds an image"),
        (part(type="text", text=IN), "column 'messages': holds an image"),
        ({"conversations": [{"from": "human", "value": PICTURE}]}, "column 'conversations': holds an"),
        ({"image": "data:text/plain;base64,AA=="}, "column 'image': 'data:text/plain"),
        ({"image": "data:image/png;base64,A"}, "is no complete base64"),
        ({"image": "data:image/png;base64,A*=="}, "is no complete base64"),
        ({"image": "data:image/png,AA=="}, "is no image in base64"),
        ({"images": ["embedded:0/0"]}, "'embedded:0/0' is a name for an image inside another data set"),
    ]
    for row, *wanted in CASES:
        if isinstance(wanted[0], str):
            with expect_fail(DataError, contains=wanted[0]): take_images(row, 5)
            continue
        plain, images = take_images(row, 5)
        test_eq((plain, len(images)), tuple(wanted))
    deep = value = []
    for _ in range(100_000): value.append(value := [])
    with expect_fail(DataError, contains="column 'messages' is nested too deeply"):
        take_images({"messages": deep})
    while deep: deep = deep.pop()  # taken apart, or freeing it would recurse

def test_images_in_memory_keep_their_pixels():
    MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "F"]
    for mode in MODES:
        image = Image.new("RGB", (5, 4), (200, 30, 60)).convert(mode if mode != "I;16" else "L")
        if mode == "I;16": image = image.convert("I;16")
        plain, (data,) = take_images({"image": image})
        with Image.open(io.BytesIO(data)) as again:
            assert again.mode == mode and again.tobytes() == image.tobytes(), mode
    turned = Image.new("RGB", (5, 4))
    turned.getexif()[0x0112] = 6
    test_eq(decode_image(io.BytesIO(take_images({"image": turned})[1][0]), "x").size, (4, 5))
    Image.effect_noise((64, 64), 90).save(whole := io.BytesIO(), "JPEG")
    cut = Image.open(io.BytesIO(whole.getvalue()[:-900]))
    with expect_fail(DataError, contains="column 'images': an image in memory cannot be read"):
        take_images({"images": [cut]})
