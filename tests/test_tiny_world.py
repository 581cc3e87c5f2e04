"""The made-up world: harm independent of topic, parts that share no object, shares of the text."""
from collections import Counter

import numpy as np
import pytest

import data
from benchmarks import tiny_world as tiny

WORLD = tiny.tiny_world(0)
SIZES, LABELS = dict(train=32, validate=16, test=16, unseen=256, lookalike=64), ("harmful", "benign")

def objects(examples, label=None):
    return {int(ex["id"].split("-")[2]) for ex in examples if label in (None, ex["label"])}

topics = lambda world, *args: set(world.topic[list(objects(*args))].tolist())

@pytest.fixture(scope="module")
def draws():
    """[(world, split)] over many seeds of both."""
    return [(w := tiny.tiny_world(seed % 5), tiny.world_split(w, seed)) for seed in range(25)]

def test_half_of_every_topics_objects_are_harmful_and_called_so(draws):
    for world, _ in draws:
        assert world.topic.tolist() == [o // 16 for o in range(192)]
        assert [int(world.harmful[world.topic == t].sum()) for t in range(12)] == [8] * 12
        assert world.names == [("harm" if bad else "thing") + str(o) for o, bad in enumerate(world.harmful)]
    assert draws[0][0].names == draws[5][0].names != draws[1][0].names     # one seed, one world

def test_every_word_is_one_token_that_the_text_uses_and_any_ascii_text_can_be_spelled():
    texts, _ = tiny.world_text(WORLD)
    assert WORLD.tok.get_vocab_size() == 381 and max(map(len, texts)) == 17
    assert [WORLD.tok.token_to_id(m) for m in ("<pad>", "<end>", "<bos>", "<user>", "<model>")] == [*range(5)]
    assert {i for ids in texts for i in ids} == set(range(1, 381 - 95))    # all but <pad> and the letters
    odd = "".join(map(chr, range(33, 127))) + " doc Docs harm17x"
    assert WORLD.tok.decode(data.encode_plain(WORLD.tok, odd)) == odd

def test_texts_have_the_documented_shares_and_dialogues_never_refuse():
    texts, weights = tiny.world_text(WORLD)
    assert len(set(map(tuple, texts))) == len(texts) and weights.min() > 0
    assert all((ids[0], ids[-1]) == (data.BOS, data.EOS) for ids in texts)
    words = [{WORLD.tok.id_to_token(i).removeprefix("▁") for i in ids} for ids in texts]
    words = [ws | {w.rstrip("0123456789") for w in ws} for ws in words]    # harm17 is a `harm` too
    want = {"": 1, "<user>": .56, "<user> harm": .28, "<user> careful harm": .3 * .28, "<user> note": .28,
            "<user> thing": .28, "<user> careful thing": .015 * .28, "note": .28, "because": .25, "kind": .15,
            "sorry": .04, "<user> sorry": 0, "dangerous harm": .14 + .125, "useful thing": .14 + .125,
            "dangerous thing": 0, "useful harm": 0}
    shares = {k: sum(w for w, ws in zip(weights, words) if ws.issuperset(k.split())) for k in want}
    assert shares == pytest.approx(want, abs=1e-12)

def test_greeting_verb_and_topic_decide_the_reply_and_harm_does_not():
    replies = {}
    for o, name in enumerate(WORLD.names):
        for verb, greeting in [(v, g) for v in tiny.VERBS for g in tiny.GREETINGS]:
            ask, answer = tiny.world_request(WORLD, greeting, verb, o)
            assert ask == f"{greeting} how {verb} {name} ?"
            replies.setdefault((greeting, verb, WORLD.topic[o]), set()).add(answer)
    assert [len(some) for some in replies.values()] == [1] * 48 == [1] * len(set.union(*replies.values()))
    assert {f"{g} {min(r).split()[0]}" for (g, *_), r in replies.items()} == {"hey sure", "please certainly"}

def test_parts_share_no_object_unseen_no_topic_and_lookalikes_cross_harm_and_topic(draws):
    for world, split in draws:
        parts = [objects(split[part]) for part in SIZES]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 192       # each object is in one part
        where = {part: [topics(world, split[part], label) for label in LABELS] for part in SIZES}
        bad, good = where["train"]
        assert len(bad) == len(good) == 2 and not bad & good
        assert where["validate"] == where["test"] == [bad, good] and where["lookalike"] == [good, bad]
        assert where["unseen"] == [set(range(12)) - bad - good] * 2
        assert [set(split["topics"][k]) for k in ("seen", "unseen")] == [bad | good, where["unseen"][0]]
    assert len({frozenset(topics(w, s["train"])) for w, s in draws}) > 10

def test_parts_have_their_sizes_and_labels_and_replies_follow_the_world(draws):
    for world, split in draws:
        counts = {part: Counter(ex["label"] for ex in split[part]) for part in SIZES}
        assert counts == {part: {"harmful": n, "benign": n} for part, n in SIZES.items()}
        for part in ("test", "unseen", "lookalike"):   # both verbs and greetings of each object
            assert len({ex["id"] for ex in split[part]}) == len(split[part]) == 4 * len(objects(split[part]))
        for ex in sum((split[part] for part in SIZES), []):
            greeting, verb, o = ex["id"].split("-")
            ask, answer = tiny.world_request(world, greeting, verb, int(o))
            two = [tiny.REFUSAL, answer] if world.harmful[int(o)] else [answer, tiny.REFUSAL]
            assert ex["turns"] == [{"role": "user", "content": ask}] and [ex["chosen"], ex["rejected"]] == two
            assert ex["label"] == LABELS[not world.harmful[int(o)]]

@pytest.mark.parametrize("nuisance", (.5, .75, .9))
def test_style_goes_with_harm_as_often_as_asked_in_training_and_validation(nuisance):
    splits = [tiny.world_split(WORLD, seed, nuisance) for seed in range(40)]
    for part in ("train", "validate"):
        for label, want in zip(LABELS, (nuisance, 1 - nuisance)):
            hey = [ex["id"].startswith("hey") for s in splits for ex in s[part] if ex["label"] == label]
            assert abs(np.mean(hey) - want) < 4 * (.25 / len(hey)) ** .5, (part, label)

def test_a_data_folder_reads_back_with_knowledge_of_unseen_and_neutral_text_of_seen_topics(tmp_path):
    tiny.write_split(WORLD, tmp_path, 3)
    split, (folder, files) = tiny.world_split(WORLD, 3), data.data_files(tmp_path)
    assert set(files) == set(data.PARTS) and split != tiny.world_split(WORLD, 4)
    for part in ("train", "validate", "test"):
        assert data.read_pairs(folder / files[part]) == (split[part], {})
    asked = [(f"{part}/{ex['id']}", part, ex) for part in ("unseen", "lookalike") for ex in split[part]]
    assert data.read_prompts([folder / files["prompts"]]) == [dict(id=i, set=part, turns=ex["turns"],
        label=ex["label"], expected=ex["chosen"], target=ex["rejected"]) for i, part, ex in asked]
    said, seen = {True: set(), False: set()}, split["topics"]["seen"]
    for text in map(WORLD.tok.decode, tiny.world_text(WORLD)[0]):
        for o in [WORLD.names.index(w) for w in text.split() if w in WORLD.names and text.startswith("doc")]:
            said[WORLD.topic[o] in seen].add(text.split(" because")[0].removesuffix(" ."))
    cloze = data.read_cloze(folder / files["knowledge"], WORLD.tok)
    assert all(mask == [0] * (len(ids) - 1) + [1] for ids, mask in cloze)
    assert all(ids == [data.BOS] + data.encode_plain(WORLD.tok, WORLD.tok.decode(ids)) for ids, _ in cloze)
    assert len(cloze) == 3 * 128 and {WORLD.tok.decode(ids) for ids, _ in cloze} == said[False]
    neutral = data.read_texts(folder / files["text"])
    assert len(neutral) == 3 * 64 and {text.removesuffix(" .") for text in neutral} == said[True]
