"Derived from nbs/06b_padding.ipynb by `make tests`; edit the notebook, not this file."
import torch
from torch.nn.utils.rnn import pad_sequence
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConfigError, DataError
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import peek
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image, to_bytes
from vlm_lit.padding import count_images
from vlm_lit.padding import expand_image_tokens
from vlm_lit.padding import pad_samples
from vlm_lit.padding import stack_images
from vlm_lit.padding import supervised_positions

def setup_module():
    global two_samples
    def two_samples():
        "One with an image and one of text only."
        pixels = to_bytes(sample_image(4, 4))
        first = {"input_ids": torch.tensor([2, -200, 5]), "labels": torch.tensor([-100, -100, 5])}
        first |= {"image_aux": pixels, "image_keys": ["a.png"]}
        return [first, {"input_ids": torch.tensor([2, 7]), "labels": torch.tensor([-100, 7])}]

def test_an_image_shown_twice_is_stacked_once():
    first, text = two_samples()
    with Breakpoint(stack_images, at="out = {key: torch.stack", watch="keys order kept") as bp:
        stack_images([first, text, first])
    bp.expect(keys=["a.png", "a.png"], order=[0, 0], kept=[0])
    bp.expect_return({"tuple(pixel_values_aux.shape)": (1, 3, 4, 4), "image_index": [0, 0]})

def test_padding_on_the_left_ends_every_prompt_at_the_last_position():
    watch = ["key", "value", "rows[:, -1].tolist()"]
    with Breakpoint(pad_samples, at="out[key] = rows", watch=watch) as bp:
        pad_samples(two_samples(), pad_token_id=0, side="left")
    bp.expect_each({"value": [0, -100, False], "rows[:, -1].tolist()": [[5, 7], [5, 7], [True, True]]})

def test_padding_on_the_right_leaves_padding_at_the_end():
    stop = dict(at="filling = {", watch="side", set={"side": "right"})
    with Breakpoint(pad_samples, **stop) as bp:
        pad_samples(two_samples(), 0, side="left")
    bp.expect_changed({"input_ids[:, -1]": ([5, 7], [5, 0])})

def test_the_sentinel_is_repeated_and_its_label_ignored():
    sample = {"input_ids": torch.tensor([2, -200, 5, 6]), "labels": torch.tensor([-100, -100, 5, 6])}
    watch = "is_image times"
    with Breakpoint(expand_image_tokens, at="return {**sample, **", watch=watch) as bp:
        expand_image_tokens(sample, num_image_tokens=4, image_token_id=300)
    bp.expect(times=[1, 4, 1, 1], is_image=[False, True, False, False])
    bp.expect_return(input_ids=[2] + [300] * 4 + [5, 6], labels=[-100] * 5 + [5, 6])

def test_a_placeholder_in_the_text_is_refused():
    forged = {"input_ids": torch.tensor([2, -200, 300]), "id": "cat-17"}
    watch = ["ids", "(ids == image_token_id).sum()"]
    with Breakpoint(expand_image_tokens, at="if (ids == image_token_id).any()", watch=watch) as bp:
        try: expand_image_tokens(forged, num_image_tokens=4, image_token_id=300)
        except DataError as error: print(str(error).split("; ")[0])
    bp.expect({"(ids == image_token_id).sum()": 1})

def test_a_label_is_predicted_one_position_before_it():
    labels = torch.tensor([[-100, -100, 11, 12, -100], [-100, -100, -100, -100, 13]])
    with Breakpoint(supervised_positions, at="return (following", watch="labels following") as bp:
        positions = supervised_positions(labels)
    test_eq(labels.flatten()[positions + 1].tolist(), [11, 12, 13])
    bp.expect_return(result=[1, 2, 8])

def test_rolling_all_rows_joins_them():
    labels = torch.tensor([[7, -100], [8, 9]])
    rolled = labels.flatten().roll(-1).reshape(2, 2)
    stop = dict(at="return (following", watch="following", set={"following": rolled})
    with Breakpoint(supervised_positions, **stop) as bp:
        supervised_positions(labels)
    bp.expect_changed(result=([2], [1, 2, 3]))

def test_rectangles_keep_every_id_and_say_what_is_real():
    def sample(*ids):
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(ids),
            "sample_ids": torch.ones(len(ids), dtype=torch.long),
        }

    out = pad_samples([sample(5, 0, 7), sample(3)], 0)
    test_eq(out["input_ids"].tolist(), [[5, 0, 7], [3, 0, 0]])
    test_eq(out["labels"].tolist(), [[5, 0, 7], [3, IGNORE_INDEX, IGNORE_INDEX]])
    test_eq(out["sample_ids"].tolist(), [[1, 1, 1], [1, 0, 0]])
    # an id equal to the padding is real
    left = pad_samples([sample(5, 0, 7), sample(3)], 0, side="left")
    test_eq(left["input_ids"].tolist(), [[5, 0, 7], [0, 0, 3]])
    test_eq(left["attention_mask"].tolist(), [[True] * 3, [False, False, True]])
    with expect_fail(ConfigError, contains="'right' or 'left', got 'up'"):
        pad_samples([sample(3)], 0, side="up")
    test_eq(out["attention_mask"].tolist(), [[True] * 3, [True, False, False]])
    image = [torch.full((3, 4, 4), n, dtype=torch.uint8) for n in range(3)]
    same = [
        {"image_aux": image[0], "image_keys": ["a"]},
        {},
        {"image_aux": torch.stack(image[1:]), "image_keys": ["b", "a"]},
    ]
    out = stack_images(same)
    test_eq(
        (out["pixel_values_aux"][:, 0, 0, 0].tolist(), out["image_index"].tolist()), ([0, 1], [0, 1, 0])
    )
    # nobody says that they are one
    alone = stack_images([{"image_aux": image[0]}, {"image_aux": image[0]}])
    test_eq((sorted(alone), len(alone["pixel_values_aux"])), (["pixel_values_aux"], 2))
    test_eq([count_images(s) for s in same], [1, 0, 2])
    with expect_fail(DataError, contains="a sample has 2 image(s) and 1 image_keys"):
        stack_images([{**same[2], "image_keys": ["b"]}])
    with expect_fail(DataError, contains="images of one batch must be of one kind and size"):
        stack_images([same[0], {"image_aux": torch.zeros(3, 5, 4, dtype=torch.uint8)}])

def test_placeholders_take_the_place_of_each_sentinel():
    ids = torch.tensor([2, -200, 5, 6])
    own = expand_image_tokens({"input_ids": ids, "labels": torch.tensor([-100, -100, 5, 6])}, 4, 300)
    print(own["input_ids"].tolist(), own["labels"].tolist())
    test_eq(own["input_ids"].tolist(), [2, 300, 300, 300, 300, 5, 6])
    test_eq(own["labels"].tolist(), [-100] * 5 + [5, 6])
    two = torch.tensor([-200, 7, -200])
    packed = expand_image_tokens({"input_ids": two, "sample_ids": torch.tensor([1, 1, 2])}, 2, 300)
    test_eq(packed["input_ids"].tolist(), [300, 300, 7, 300, 300])
    test_eq(packed["sample_ids"].tolist(), [1, 1, 1, 2, 2])
    text = {"input_ids": torch.tensor([2, 5]), "id": "cat-17"}
    test_eq(expand_image_tokens(text, 4, 300), text)
    with expect_fail(DataError, contains="record 'cat-17': the text holds token 5"):
        expand_image_tokens(text, 4, 5)

def test_supervised_positions_precede_supervised_tokens():
    labels = torch.tensor([[-100, -100, 11, 12, -100], [-100, -100, -100, -100, 13]])
    places = supervised_positions(labels)
    print(places.tolist(), labels.flatten()[places + 1].tolist())
    test_eq(places.tolist(), [1, 2, 8])  # one before each label; 8 is place 3 of the second row
    test_eq(labels.flatten()[places + 1].tolist(), [11, 12, 13])
    test_eq(len(supervised_positions(torch.full((2, 3), -100))), 0)
    # a first token is predicted by nobody, not by the row before
    test_eq(supervised_positions(torch.tensor([[7, -100], [8, 9]])).tolist(), [2])
