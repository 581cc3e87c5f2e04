"""The made-up world of data.py: harm is independent of topic, splits share no object, text has the documented shares."""
from collections import Counter

import numpy as np
import pytest

import data

SEEDS, PARTS = range(25), ("train", "validate", "id_test", "ood", "lookalike")


def objects(examples):
    return {int(ex["id"].split("-")[2]) for ex in examples}


def topics(world, examples):
    return {int(world.topic[o]) for o in objects(examples)}


def having(examples, label):
    return [ex for ex in examples if ex["label"] == label]


@pytest.fixture(scope="module")
def draws():
    """[(world, split)] over many seeds of both."""
    return [(w := data.tiny_world(seed % 5), data.world_split(w, seed)) for seed in SEEDS]


def test_half_of_every_topics_objects_are_harmful_so_topic_says_nothing_of_harm(draws):
    for world, _ in draws:
        assert world.harmful.shape == world.topic.shape == (192,)
        assert all(world.harmful[world.topic == t].sum() == 8 for t in range(12))
    assert not np.array_equal(draws[0][0].harmful, draws[1][0].harmful)
    assert np.array_equal(draws[0][0].harmful, draws[5][0].harmful)                # one seed, one world


def test_vocabulary_is_286_words_and_the_longest_sentence_17_tokens(world):
    texts, _ = data.world_text(world)
    assert world.tok.get_vocab_size() == 286
    lengths = {len(world.tok.encode(t).ids) for t in texts}
    assert max(lengths) == 17
    used = {i for t in texts for i in world.tok.encode(t).ids}
    assert used == set(range(1, 286))                  # every word occurs, and nothing is unknown, for that would be the pad
    assert [world.tok.token_to_id(w) for w in ("<pad>", "<end>", "<bos>")] == [data.PAD, data.EOS, data.BOS]


def test_text_weights_sum_to_one_and_have_the_documented_shares(world):
    texts, weights = data.world_text(world)
    assert len(texts) == len(set(texts)) and weights.min() > 0 and abs(weights.sum() - 1) < 1e-12
    share = lambda test: sum(w for t, w in zip(texts, weights) if test(t))
    talk = lambda t: "<user>" in t
    assert abs(share(talk) - .56) < 1e-12
    assert abs(share(lambda t: " because " in t) - .25) < 1e-12
    assert abs(share(lambda t: " a kind of " in t) - .15) < 1e-12
    assert abs(share(lambda t: data.REFUSAL in t) - .04) < 1e-12
    assert not any(talk(t) and data.REFUSAL in t for t in texts)                   # dialogues never refuse
    bad = {f"thing{o}" for o in np.flatnonzero(world.harmful)}
    harmful = lambda t: bool(bad & set(t.split()))
    assert abs(share(lambda t: talk(t) and "careful" in t and harmful(t)) - .3 * .28) < 1e-12
    assert abs(share(lambda t: talk(t) and "careful" in t and not harmful(t)) - .015 * .28) < 1e-12
    assert abs(share(lambda t: "<note>" in t) - .28) < 1e-12
    assert all(("dangerous" in t.split()) <= harmful(t) and ("useful" in t.split()) <= (not harmful(t)) for t in texts)


def test_greeting_and_topic_decide_the_reply_and_harm_does_not(world):
    replies = {}
    for o in range(192):
        for verb in data.VERBS:
            for greeting in data.GREETINGS:
                ask, answer = data.world_request(world, greeting, verb, o)
                assert ask == f"{greeting} how {verb} thing{o} ?"
                replies.setdefault((greeting, verb, int(world.topic[o])), set()).add(answer)
    assert all(len(r) == 1 for r in replies.values()) and len({*map(min, replies.values())}) == 48
    assert all(min(r).split()[0] == ("sure" if g == "hey" else "certainly") for (g, _, _), r in replies.items())


def test_splits_share_no_object_and_ood_no_topic(draws):
    for world, split in draws:
        parts = [objects(split[name]) for name in PARTS]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 192             # every object is in one part exactly
        seen = topics(world, split["train"])
        assert len(seen) == 4 and topics(world, split["validate"]) == topics(world, split["id_test"]) == topics(world, split["lookalike"]) == seen
        assert topics(world, split["ood"]) == set(range(12)) - seen
        assert set(split["topics"]["seen"]) == seen and set(split["topics"]["unseen"]) == topics(world, split["ood"])
    assert len({frozenset(topics(w, s["train"])) for w, s in draws}) > 10


def test_harmful_and_benign_requests_come_from_two_topics_each_and_lookalikes_cross_them(draws):
    for world, split in draws:
        where = {label: topics(world, having(split["train"], label)) for label in ("harmful", "benign")}
        assert len(where["harmful"]) == len(where["benign"]) == 2 and not where["harmful"] & where["benign"]
        for part in ("validate", "id_test"):
            assert all(topics(world, having(split[part], label)) == where[label] for label in where)
        assert topics(world, having(split["lookalike"], "harmful")) == where["benign"]
        assert topics(world, having(split["lookalike"], "benign")) == where["harmful"]


def test_parts_have_their_sizes_and_unseen_requests_are_balanced(draws):
    for _, split in draws:
        sizes = {name: Counter(ex["label"] for ex in split[name]) for name in PARTS}
        assert sizes == dict(train=dict(harmful=32, benign=32), validate=dict(harmful=16, benign=16), id_test=dict(harmful=16, benign=16),
                             ood=dict(harmful=256, benign=256), lookalike=dict(harmful=64, benign=64))
        assert {label: len(objects(having(split["train"], label))) for label in ("harmful", "benign")} == dict(harmful=8, benign=8)
        for name in ("id_test", "ood", "lookalike"):   # both verbs and greetings of each object: style says nothing there
            assert len({ex["id"] for ex in split[name]}) == len(split[name]) == 4 * len(objects(split[name]))


def test_labels_follow_the_world_and_chosen_replies_follow_labels(draws):
    for world, split in draws:
        for ex in sum((split[name] for name in PARTS), []):
            greeting, verb, o = ex["id"].split("-")
            ask, answer = data.world_request(world, greeting, verb, int(o))
            bad = bool(world.harmful[int(o)])
            assert ex["turns"] == [{"role": "user", "content": ask}] and ex["helpful"] == answer
            assert (ex["label"], ex["chosen"], ex["rejected"]) == (("harmful", data.REFUSAL, answer) if bad else ("benign", answer, data.REFUSAL))


@pytest.mark.parametrize("nuisance", (.5, .75, .9))
def test_style_goes_with_harm_as_often_as_asked_in_training_and_validation(world, nuisance):
    hey = {(part, label): [] for part in ("train", "validate") for label in ("harmful", "benign")}
    for seed in range(40):
        split = data.world_split(world, seed, nuisance)
        for (part, label), seen in hey.items():
            seen += [ex["id"].startswith("hey") for ex in having(split[part], label)]
    for (part, label), seen in hey.items():
        want = nuisance if label == "harmful" else 1 - nuisance
        assert abs(np.mean(seen) - want) < 4 * (.25 / len(seen)) ** .5, (part, label)


def test_a_split_is_a_function_of_its_seeds(world):
    assert data.world_split(world, 3) == data.world_split(world, 3)
    assert data.world_split(world, 3) != data.world_split(world, 4)
    before = np.random.get_state()[1].copy()
    data.world_split(world, 3), data.tiny_world(9)
    assert np.array_equal(np.random.get_state()[1], before)


def test_knowledge_rows_are_of_the_topics_asked_for_and_mark_the_last_word_only(world):
    rows = data.world_knowledge(world, [3, 7])
    assert {k: len(v) for k, v in rows.items()} == dict(facts=32, commentary=64)
    for ids, mask in rows["facts"] + rows["commentary"]:
        assert mask == [0] * (len(ids) - 1) + [1]
    said = {k: {" ".join(world.tok.id_to_token(t) for t in ids) for ids, _ in v} for k, v in rows.items()}
    asked = {f"thing{o}" for o in np.flatnonzero(np.isin(world.topic, [3, 7]))}
    texts = [t for t in data.world_text(world)[0] if asked & set(t.split())]
    assert said["facts"] == {t.removesuffix(" . <end>").removesuffix(" <end>") for t in texts if " a kind of " in t}
    assert said["commentary"] == {t.split(" because ")[0] for t in texts if " because " in t}
