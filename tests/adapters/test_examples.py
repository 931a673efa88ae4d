"""Which tokens the loss is about, what is cut, and which columns are read."""

import pytest

from hubforge.adapters._examples import IGNORED, Columns, Encoder, columns_of, make_examples
from hubforge.errors import SourceError
from hubforge.models import load_tokenizer

NONE = Columns("text")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who walked?"},
    {"role": "assistant", "content": "The keeper."},
    {"role": "user", "content": "Where to?"},
    {"role": "assistant", "content": "To the harbour."},
]


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


def learnt(tokenizer, row, template=None, format=None):
    """The text of the tokens the loss is about; and all of the text."""
    columns = columns_of(row, format, NONE)
    example = Encoder(tokenizer, columns, template)(row, "row 1")
    assert len(example.ids) == len(example.labels)
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))
    return tokenizer.decode([label for label in example.labels if label != IGNORED]), tokenizer.decode(example.ids)


def test_a_chat_learns_the_assistant_turns_with_their_ends(tokenizer):
    said, text = learnt(tokenizer, {"messages": CHAT})
    assert said == "The keeper.<|eot_id|>To the harbour.<|eot_id|>"
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_sharegpt_roles_are_understood(tokenizer):
    row = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The cook."}]}
    assert learnt(tokenizer, row)[0] == "The cook.<|eot_id|>"


def test_a_template_with_generation_marks_says_itself_what_is_learnt(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}U:{{ m.content }}{% endif %};{% endfor %}"
    )
    assert learnt(tokenizer, {"messages": CHAT})[0] == "The keeper.To the harbour."


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}{{ m.content }}{% else %}-{% endif %}{% endfor %}"
    )
    with pytest.raises(SourceError, match="row 1: the chat template changes earlier turns"):
        learnt(tokenizer, {"messages": CHAT})


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        ("llama3_chat_template", "{}<|eot_id|>"),
        ("qwen2_5_chat_template", "{}<|im_end|>"),
        (
            "qwen3_chat_template",
            "<think>\n\n</think>\n\n{}<|im_end|>\n",
        ),  # It rewrites earlier turns: TRL's form of it.
        ("gemma3_chat_template", "{}<end_of_turn>"),
        ("gemma4_chat_template", "{}<turn|>"),
    ],
)
def test_the_templates_of_published_models(tokenizer, template, turn):
    """As TRL keeps them, the texts of the models' own repositories."""
    import trl.chat_template_utils as published

    tokenizer.chat_template = getattr(published, template)
    said, text = learnt(tokenizer, {"messages": CHAT})
    assert said == turn.format("The keeper.") + turn.format("To the harbour.")
    assert "Who walked?" in text and "Be brief." in text


def test_a_pair_through_the_template_is_a_chat_of_two_turns(tokenizer):
    said, text = learnt(tokenizer, {"instruction": "Name it.", "input": "A boat", "output": "The Gull."})
    assert said == "The Gull.<|eot_id|>"
    assert "user<|end_header_id|>\n\nName it.\n\nA boat<|eot_id|>" in text


def test_a_pair_without_a_template_learns_the_answer_after_a_blank_line(tokenizer):
    said, text = learnt(tokenizer, {"prompt": "Name it.", "completion": "The Gull."}, template=False)
    assert said == f"The Gull.{tokenizer.eos_token}"
    assert text == f"<|begin_of_text|>Name it.\n\nThe Gull.{tokenizer.eos_token}"


def test_a_prompt_of_messages_learns_none_of_its_own_assistant_turns(tokenizer):
    row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    assert learnt(tokenizer, row)[0] == "To the harbour.<|eot_id|>"


def test_text_is_learnt_whole_with_its_end(tokenizer):
    said, _ = learnt(tokenizer, {"text": "The sea was calm."})
    assert said == f"<|begin_of_text|>The sea was calm.{tokenizer.eos_token}"


def test_no_template_for_a_chat_says_where_to_get_one(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(SourceError, match="no chat template") as caught:
        learnt(tokenizer, {"messages": CHAT})
    assert "`tokenizer`" in caught.value.mend


ROWS = [
    ({"messages": [], "text": "x"}, None, "chat"),
    ({"prompt": "x", "response": "y", "text": "z"}, None, "instruction"),
    ({"prompt": "x", "text": "z"}, None, "text"),
    ({"messages": [], "text": "x"}, "text", "text"),
]


@pytest.mark.parametrize(("row", "asked", "found"), ROWS)
def test_the_format_is_seen_from_the_columns(row, asked, found):
    assert columns_of(row, asked, NONE).format == found


def test_a_named_column_decides():
    row = {"messages": [], "story": "x", "question": "q", "reply": "r"}
    assert columns_of(row, None, Columns("text", text="story")) == Columns("text", text="story")
    pair = columns_of(row, None, Columns("text", prompt="question", completion="reply"))
    assert pair == Columns("instruction", prompt="question", completion="reply")


def test_a_row_with_nothing_to_train_on_lists_its_columns():
    with pytest.raises(SourceError, match="no column to train on") as caught:
        columns_of({"body": "x"}, None, NONE)
    assert "Columns: body." in caught.value.mend and "`messages`" in caught.value.mend
    with pytest.raises(SourceError, match="no column to train on as chat"):
        columns_of({"text": "x"}, "chat", NONE)


def test_long_rows_are_cut_and_counted_and_those_with_no_answer_left_are_dropped(tokenizer):
    short, long = "A calm sea.", "The lantern keeper walked to the harbour. " * 8
    rows = [{"prompt": short, "completion": short}, {"prompt": short, "completion": long}]
    rows.append({"prompt": long, "completion": short})
    columns = columns_of(rows[0], None, NONE)
    encode = Encoder(tokenizer, columns, None)
    whole = [len(encode(row, "").ids) for row in rows]
    limit = whole[0] + 10
    made = make_examples(rows, encode, max_length=limit)
    assert (made.truncated, made.skipped, made.longest) == (2, 1, max(whole))
    assert [len(example.ids) for example in made.train] == [whole[0], limit]
    assert made.tokens == whole[0] + limit
    assert made.loss_tokens == sum(label != IGNORED for example in made.train for label in example.labels)


def test_what_is_held_out_is_drawn_from_the_seed(tokenizer):
    rows = [{"text": f"Line {number}."} for number in range(20)]
    columns = columns_of(rows[0], None, NONE)
    encode = Encoder(tokenizer, columns, None)

    def held(seed):
        made = make_examples(rows, encode, max_length=64, eval_share=0.25, seed=seed)
        assert (len(made.train), len(made.held_out)) == (15, 5)
        return [example.ids for example in made.held_out]

    assert held(1) == held(1) != held(2)
