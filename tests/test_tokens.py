"""Chat templates and masks: on a small tokenizer with Gemma's special tokens, and on the real ones where they lie at hand.

SAILS_REAL names a folder with gemma-2-tokenizer/, gemma-3-270m/ and hh-rlhf/harmless-base/test.jsonl.gz.
"""
import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import data

START, END, NEWLINE = 106, 107, 108
REAL = Path(os.environ.get("SAILS_REAL", ""))
TALK = [{"role": "user", "content": "May I borrow a ladder?"}, {"role": "assistant", "content": "Which one?"},
        {"role": "user", "content": "The long one."}]


def small_tokenizer():
    """A character tokenizer built like Gemma 2's: specials at 2 / 106 / 107, runs of newlines from 108 on, <bos> by itself."""
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    letters = [chr(c) for c in range(33, 127)] + ["▁"]
    vocab |= {c: 4 + i for i, c in enumerate(letters)}
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), START)}
    vocab |= {"<start_of_turn>": START, "<end_of_turn>": END} | {"\n" * n: NEWLINE - 1 + n for n in range(1, 6)}
    merges = [("u", "s"), ("us", "e"), ("use", "r"), ("m", "o"), ("mo", "d"), ("mod", "e"), ("mode", "l"), ("▁", "I")]
    vocab |= {a + b: 113 + i for i, (a, b) in enumerate(merges)}
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tok.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(1, 6)])
    tok.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tok


def official(turns, reply=None):
    """The text that Gemma's published chat template makes of a conversation, written out by hand."""
    text = "<bos>"
    for turn in turns:
        name = {"user": "user", "assistant": "model"}[turn["role"]]
        text += f"<start_of_turn>{name}\n{turn['content'].strip()}<end_of_turn>\n"
    text += "<start_of_turn>model\n"
    return text if reply is None else text + f"{reply.strip()}<end_of_turn>\n"


def written(tok, ids):
    return tok.decode(ids, skip_special_tokens=False)


def trained_on(ids, mask):
    return [t for t, m in zip(ids, mask) if m]


@pytest.fixture(scope="module")
def tok():
    return small_tokenizer()


def test_small_tokenizer_has_gemmas_special_ids_and_adds_bos_by_itself(tok):
    assert [tok.token_to_id(t) for t in ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "\n")] == [0, 1, 2, 106, 107, 108]
    assert tok.encode("a").ids[0] == 2 and tok.encode("\n\n\n").ids == [2, 110]


def test_gemma_prompt_is_the_official_templates_text(tok):
    ids, mask = data.render_chat(tok, TALK, style="gemma")
    assert written(tok, ids) == official(TALK)
    assert ids[:3] == [2, START, tok.token_to_id("user")] and ids[-3:] == [START, tok.token_to_id("model"), NEWLINE]
    assert sum(mask) == 0


def test_gemma_prompt_and_reply_are_the_official_templates_text(tok):
    ids, _ = data.render_chat(tok, TALK, "\n It is in the shed. \n", "gemma")
    assert written(tok, ids) == official(TALK, "It is in the shed.")
    padded = [{**turn, "content": f" \n{turn['content']}\n\n"} for turn in TALK]          # the template trims every text
    assert data.render_chat(tok, padded, "It is in the shed.", "gemma")[0] == ids


@pytest.mark.parametrize("style", ["gemma", "hh"])
def test_bos_stands_once_though_the_tokenizer_would_add_its_own(tok, style):
    ids, _ = data.render_chat(tok, TALK, "Yes.", style)
    assert ids[0] == 2 and ids.count(2) == 1


@pytest.mark.parametrize("style", ["gemma", "hh"])
@pytest.mark.parametrize("reply", ["Yes.", " Yes.", "\nYes.", "\n\n\nYes.\n", "  \n Yes. \n\n", "I"])
def test_prompt_ids_are_a_prefix_even_where_the_reply_begins_with_newlines(tok, style, reply):
    prompt, _ = data.render_chat(tok, TALK, style=style)
    ids, mask = data.render_chat(tok, TALK, reply, style)
    assert ids[:len(prompt)] == prompt and mask[:len(prompt)] == [0] * len(prompt) and len(ids) == len(mask)


def test_encoded_in_one_piece_a_leading_newline_would_melt_into_the_template(tok):
    together = tok.encode("<start_of_turn>model\n\nYes.", add_special_tokens=False).ids
    apart = tok.encode("<start_of_turn>model\n", add_special_tokens=False).ids + tok.encode("\nYes.", add_special_tokens=False).ids
    assert NEWLINE + 1 in together and together != apart    # the reason why render_chat encodes prompt and reply apart


@pytest.mark.parametrize("style, end, after", [("gemma", END, [NEWLINE]), ("hh", 1, [])])
def test_mask_covers_exactly_the_reply_and_its_end(tok, style, end, after):
    prompt, _ = data.render_chat(tok, TALK, style=style)
    ids, mask = data.render_chat(tok, TALK, "\n In the shed. ", style)
    assert mask == [0] * len(prompt) + [1] * sum(mask) + [0] * len(after) and ids[len(ids) - len(after):] == after
    assert written(tok, trained_on(ids, mask)[:-1]).strip() == "In the shed." and trained_on(ids, mask)[-1] == end


def test_hh_prompt_is_hh_rlhfs_own_form(tok):
    ids, _ = data.render_chat(tok, TALK[:1], "Of course.", "hh")
    assert written(tok, ids) == "<bos>\n\nHuman: May I borrow a ladder?\n\nAssistant: Of course.<eos>"


@pytest.mark.parametrize("style", ["gemma", "hh"])
def test_earlier_replies_of_a_conversation_are_not_trained_on(tok, style):
    ids, mask = data.render_chat(tok, TALK, "Here.", style)
    assert "Which one?" in written(tok, ids) and "Which" not in written(tok, trained_on(ids, mask))


def test_a_reply_ends_the_same_way_as_a_turn_inside_a_conversation(tok):
    """What is trained as the end must be what a later prompt holds at that place."""
    for style in ("gemma", "hh"):
        first, _ = data.render_chat(tok, TALK[:1], TALK[1]["content"], style)
        longer, _ = data.render_chat(tok, TALK, style=style)
        assert longer[:len(first)] == first


@pytest.mark.parametrize("style, ends", [("gemma", {1, END}), ("hh", {1})])
def test_stop_ids_hold_eos_and_the_styles_own_end(tok, style, ends):
    assert data.stop_ids(tok, style) == ends


def test_empty_reply_trains_only_on_the_end(tok):
    ids, mask = data.render_chat(tok, TALK, "", "gemma")
    assert trained_on(ids, mask) == [END]


@pytest.mark.parametrize("turns, word", [
    ([{"role": "system", "content": "Be brief."}] + TALK, "begin and end"),
    ([{"role": "system", "content": "Be brief."}, TALK[1], TALK[2]], "no system role"),
    ([TALK[0], TALK[2]], "begin and end"), ([], "begin and end"), ([TALK[0], TALK[0], TALK[2]], "'assistant'"),
    ([{"role": "user"}], "no text"), ([{"role": "user", "content": None}], "no text")])
def test_impossible_conversations_are_refused_with_the_way_out(tok, turns, word):
    with pytest.raises(data.UserError, match=word):
        data.render_chat(tok, turns)


@pytest.mark.parametrize("spec, style", [
    ("google/gemma-2-9b", "hh"), ("google/gemma-2-9b-it", "gemma"), ("google/gemma-2-9b-it@main", "gemma"), ("dir/gemma-2-2b-it/", "gemma"),
    ("google/gemma-3-270m", "hh"), ("google/gemma-3-270m-it@refs/pr/1", "gemma"), ("dir/not-a-chat-model-italic", "hh")])
def test_style_comes_from_the_models_name(tok, spec, style):
    assert data.default_style(spec, tok) == style


def test_tokenizer_with_another_bos_is_refused(tmp_path):
    wrong = Tokenizer(models.WordLevel({"<bos>": 0, "<unk>": 1}, unk_token="<unk>"))
    wrong.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(data.UserError, match="<bos> has id 0"):
        data.load_tokenizer(tmp_path)


def test_published_truncation_and_padding_are_switched_off(tok, tmp_path):
    strict = small_tokenizer()
    strict.enable_truncation(4), strict.enable_padding(length=8)
    strict.save(str(tmp_path / "tokenizer.json"))
    assert len(data.load_tokenizer(tmp_path).encode("a long line of text").ids) == len(tok.encode("a long line of text").ids)


# ----------------------------------------------------------------------------------------------------- HH-RLHF's form
def hh(*texts):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {t}" for i, t in enumerate(texts))


def test_hh_rows_keep_their_turns_and_odd_rows_are_counted(tmp_path):
    rows = [dict(chosen=hh("A?", "B.", "C?", "D."), rejected=hh("A?", "B.", "C?", "E.")),
            dict(chosen=hh("A?", "B."), rejected=hh("X?", "E.")),                            # prompts differ
            dict(chosen=hh("A?", ""), rejected=hh("A?", "E.")),                              # empty reply
            dict(chosen=hh("A?", "B.") + "\n\nAssistant: C.", rejected=hh("A?", "E."))]      # one reply in two blocks
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    pairs, dropped = data.read_pairs(tmp_path / "test.jsonl.gz")
    assert dropped == {"prompts differ": 1, "empty reply": 1}
    assert [t["content"] for t in pairs[0]["turns"]] == ["A?", "B.", "C?"] and (pairs[0]["chosen"], pairs[0]["rejected"]) == ("D.", "E.")
    assert pairs[1]["chosen"] == "B.\n\nC." and [t["role"] for t in pairs[1]["turns"]] == ["user"]


@pytest.mark.parametrize("text", ["Human: A?\n\nAssistant: B.", "\n\nAssistant: B.\n\nHuman: A?", hh("A?", "B.", "C?"), "", hh("A?")])
def test_a_text_that_is_no_hh_dialogue_is_refused(text):
    with pytest.raises(data.UserError, match="not an HH-RLHF dialogue"):
        data.split_hh(text)


# -------------------------------------------------------------------------------------------- the real tokenizers
REALS = {"gemma-2": ("gemma-2-tokenizer", 106, 107), "gemma-3": ("gemma-3-270m", 105, 106)}


@pytest.fixture(scope="module")
def real_pairs():
    path = REAL / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    if not os.environ.get("SAILS_REAL") or not path.exists():
        pytest.skip("SAILS_REAL names no folder with hh-rlhf/harmless-base/test.jsonl.gz")
    return data.read_pairs(path)


@pytest.fixture(scope="module", params=REALS)
def real(request):
    folder, start, end = REALS[request.param]
    if not os.environ.get("SAILS_REAL") or not (REAL / folder / "tokenizer.json").exists():
        pytest.skip(f"SAILS_REAL names no folder with {folder}/tokenizer.json")
    return data.load_tokenizer(REAL / folder), start, end


def test_real_hh_has_2312_test_rows_of_which_four_are_left_out(real_pairs):
    pairs, dropped = real_pairs
    assert len(pairs) == 2308 and dropped == {"empty reply": 4}
    assert {len(p["turns"]) % 2 for p in pairs} == {1} and all(p["rejected"] for p in pairs)


def test_real_turn_ids_and_stop_ids(real):
    tok, start, end = real
    ids, _ = data.render_chat(tok, TALK[:1], "Of course.", "gemma")
    newline = end + 1                                  # 108 in Gemma 2, 107 in Gemma 3
    assert ids[:4] == [2, start, tok.token_to_id("user"), newline] and ids[-2:] == [end, newline]
    assert data.stop_ids(tok, "gemma") == {1, end} and data.stop_ids(tok, "hh") == {1}


@pytest.mark.slow
@pytest.mark.parametrize("style", ["gemma", "hh"])
def test_real_hh_pairs_make_the_round_trip(real, real_pairs, style):
    """All replies: prompt ids are a prefix, one <bos>, the text is the template's, the mask is the reply and its end."""
    tok, start, end_of_turn = real
    form = data.STYLES[style]
    end, after = tok.token_to_id(form["end"]), tok.encode(form["after"], add_special_tokens=False).ids
    for pair in real_pairs[0]:
        prompt, _ = data.render_chat(tok, pair["turns"], style=style)
        for reply in (pair["chosen"], pair["rejected"]):
            ids, mask = data.render_chat(tok, pair["turns"], reply, style)
            n = len(ids) - len(prompt) - len(after)
            assert ids[:len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * n + [0] * len(after), pair["id"]
            assert ids[len(prompt) + n - 1] == end and ids[len(prompt) + n:] == after, pair["id"]
            assert written(tok, ids[len(prompt):len(prompt) + n - 1]).strip() == reply.strip(), pair["id"]
            assert ids[0] == 2 and ids.count(2) == 1, pair["id"]
            text = written(tok, ids)
            if style == "gemma":
                assert text == official(pair["turns"], reply), pair["id"]
                assert ids.count(start) == ids.count(end_of_turn) == len(pair["turns"]) + 1, pair["id"]
            # encoded apart is encoded together here, for HH's replies are trimmed: counted once, 0 of 4,616 differ
            assert tok.encode(text, add_special_tokens=False).ids == ids, pair["id"]
