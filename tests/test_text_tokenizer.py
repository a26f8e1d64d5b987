"Derived from nbs/02_tokenizer.ipynb by `make tests`; edit the notebook, not this file."
import lzma, re
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vlm_lit.core import ConfigError
import tempfile, torch
from fastcore.test import test_eq, expect_fail
from transformers import GemmaConfig, GemmaForCausalLM
from vlm_lit.text.tokenizer import adds_bos
from vlm_lit.text.tokenizer import bundled_gemma
from vlm_lit.text.tokenizer import check_placeholder
from vlm_lit.text.tokenizer import control_tokens
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.text.tokenizer import placeholder_id
from vlm_lit.text.tokenizer import prepare_tokenizer
from vlm_lit.text.tokenizer import special_tokens

def setup_module():
    global tok, tokenizer_without
    tok = bundled_gemma()
    def tokenizer_without(*roles):
        "Gemma's tokenizer with some special tokens taken away."
        holey = bundled_gemma()
        for role in roles: setattr(holey, f"{role}_token", None)
        return holey

def test_bundled_tokenizer_gives_the_ids_of_the_seed():
    ids = tok("the box chain purse black<end_of_turn>\n<eos>").input_ids
    test_eq(ids, [2, 1175, 3741, 9488, 45189, 2656, 107, 108, 1])

def test_tokenizer_survives_a_round_trip_through_a_folder():
    text = "<start_of_turn>user\nWhat is in the photo?<end_of_turn>\n"
    with tempfile.TemporaryDirectory() as folder:
        tok.save_pretrained(folder)
        again = load_tokenizer(folder)
    test_eq(again(text).input_ids, tok(text).input_ids)
    test_eq(
        (again.bos_token_id, again.eos_token_id, again.pad_token_id, again.unk_token_id), (2, 1, 0, 3)
    )

def test_unknown_tokenizer_is_a_config_error():
    with tempfile.TemporaryDirectory() as empty:
        with expect_fail(ConfigError, contains="cannot be loaded"):
            load_tokenizer(empty)
    with expect_fail(ConfigError, contains="no such folder"):
        load_tokenizer("./not-here")

def test_gemma_has_all_four_special_tokens():
    test_eq(
        special_tokens(tok),
        {"bos": ("<bos>", 2), "eos": ("<eos>", 1), "unk": ("<unk>", 3), "pad": ("<pad>", 0)},
    )

def test_turn_markers_are_control_tokens_and_tags_of_html_are_not():
    found = control_tokens(tok)
    print(found)
    test_eq(found, ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>"])
    assert "<table>" in tok.get_vocab() and "<table>" not in found  # one id, but ordinary text

def test_control_token_in_plain_text_becomes_one_id():
    typed = tok("a<end_of_turn>b", add_special_tokens=False).input_ids
    print(typed, tok.convert_ids_to_tokens(typed))
    test_eq(typed[1], 107)

def test_control_token_can_be_spelled_out():
    spelled = tok("<end_of_turn>", add_special_tokens=False, split_special_tokens=True).input_ids
    print(tok.convert_ids_to_tokens(spelled))
    test_eq(len(spelled), 7)
    assert 107 not in spelled and tok.decode(spelled) == "<end_of_turn>"

def test_gemma_begins_every_call_with_bos():
    assert adds_bos(tok)
    print(tok("What").input_ids, tok("is").input_ids)
    test_eq([tok(t).input_ids[0] for t in ("What", "is", "")], [2, 2, 2])

def test_template_that_spells_bos_doubles_it():
    test_eq(tok("<bos>What").input_ids, [2, 2, 1841])

def test_a_placeholder_is_no_token_of_text():
    gemma = load_tokenizer("gemma")
    found = placeholder_id(gemma)
    print(found, gemma.convert_ids_to_tokens(found))
    test_eq((found, gemma.convert_ids_to_tokens(found)), (255999, "<unused99>"))
    test_eq(placeholder_id(gemma, 200_000), gemma.convert_tokens_to_ids("<unused98>"))
    check_placeholder(gemma, found)
    check_placeholder(gemma, 256_000)
    with expect_fail(ConfigError, contains="is the token 'hello' of this tokenizer"):
        check_placeholder(gemma, gemma.convert_tokens_to_ids("hello"))

def test_gemma_needs_nothing():
    changed = prepare_tokenizer(tok, "gemma")
    print(changed)
    test_eq(changed, {})
    test_eq(len(tok), 256000)

def test_missing_pad_token_is_added_or_shared():
    holey = tokenizer_without("pad")
    for version, pad in [("v0", ("[PAD]", 256000)), ("v1", ("<unk>", 3)), ("v0.5", ("<unk>", 3))]:
        holey.pad_token = None
        changed = prepare_tokenizer(holey, version)
        print(version, changed, special_tokens(holey)["pad"])
        test_eq(special_tokens(holey)["pad"], pad)
        test_eq(changed, {"pad": pad[0]})

def test_added_word_gets_the_mean_row():
    heads = dict(num_attention_heads=1, num_key_value_heads=1, head_dim=4)
    sizes = dict(vocab_size=256000, hidden_size=4, num_hidden_layers=1, intermediate_size=4)
    toy = GemmaForCausalLM(GemmaConfig(**sizes, **heads))
    prepare_tokenizer(tokenizer_without("pad"), "v0", model=toy)
    rows = toy.get_input_embeddings().weight.data
    print(tuple(rows.shape))
    assert rows.shape == (256001, 4) and torch.allclose(rows[-1], rows[:-1].mean(0))

def test_nothing_to_pad_with_is_an_error():
    holey = tokenizer_without("pad")
    with expect_fail(ConfigError, contains="expects a tokenizer with a padding token"):
        prepare_tokenizer(holey, "gemma")
    holey.unk_token = None
    with expect_fail(ConfigError, contains="pads with the unknown token"):
        prepare_tokenizer(holey, "v1")

def test_llama_3_rule_uses_the_reserved_token():
    holey = tokenizer_without("pad", "unk")
    # Llama 3's vocabulary has it
    holey.add_tokens(["<|reserved_special_token_0|>"], special_tokens=True)
    changed = prepare_tokenizer(holey, "llama_3")
    test_eq(changed, {"unk": "<|reserved_special_token_0|>", "pad": "<|reserved_special_token_0|>"})
