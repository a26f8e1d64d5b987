"Derived from nbs/06b_padding.ipynb by `make tests`; edit the notebook, not this file."
import torch
from torch.nn.utils.rnn import pad_sequence
from vlm_lit.core import IGNORE_INDEX, DataError
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import peek
from vlm_lit.images import sample_image, to_bytes
from vlm_lit.padding import count_images
from vlm_lit.padding import pad_samples
from vlm_lit.padding import stack_images

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
    test_eq(out["attention_mask"].tolist(), [[True] * 3, [True, False, False]])
    image = [torch.full((3, 4, 4), n, dtype=torch.uint8) for n in range(3)]
    same = [
        {"image_aux": image[0], "image_keys": ["a"]},
        {},
        {"image_aux": torch.stack(image[1:]), "image_keys": ["b", "a"]},
    ]
    out = stack_images(same)
    test_eq((out["images_aux"][:, 0, 0, 0].tolist(), out["image_index"].tolist()), ([0, 1], [0, 1, 0]))
    # nobody says that they are one
    alone = stack_images([{"image_aux": image[0]}, {"image_aux": image[0]}])
    test_eq((sorted(alone), len(alone["images_aux"])), (["images_aux"], 2))
    test_eq([count_images(s) for s in same], [1, 0, 2])
    with expect_fail(DataError, contains="a sample has 2 image(s) and 1 image_keys"):
        stack_images([{**same[2], "image_keys": ["b"]}])
    with expect_fail(DataError, contains="images of one batch must be of one kind and size"):
        stack_images([same[0], {"image_aux": torch.zeros(3, 5, 4, dtype=torch.uint8)}])
