"""Ordinary conversations get exactly the tokens that mlx-lm gives them, through templates of every kind."""

from hypothesis import given, settings
from hypothesis import strategies as st
from support_answers import WEATHER
from support_templates import TEMPLATES, templated

from mlx_optiq_ext.engine.prompt import Renderer
from mlx_optiq_ext.engine.tools.parsed import definitions
from mlx_optiq_ext.types.chat import Generation, Message, Text

WRAPPED = {name: templated(name, thinks=name == "headers") for name in TEMPLATES}
RENDERERS = {name: Renderer(wrapped) for name, wrapped in WRAPPED.items()}
# Anything but what spells a control token of these tokenizers.
WORDS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<[\ufdd0\ufdd1"), min_size=1, max_size=30
)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    system=st.none() | WORDS,
    texts=st.lists(WORDS, min_size=1, max_size=6),
    tools=st.booleans(),
)
def test_tokens_are_those_of_the_stock_template(name, system, texts, tools):
    if len(texts) % 2 == 0:
        texts = texts[:-1]
    takes = RENDERERS[name]._form
    system = system if takes.system != "never" else None
    offered = (WEATHER,) if tools and takes.tools else ()
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    stock = WRAPPED[name].apply_chat_template(
        turns, tools=definitions(offered) or None, add_generation_prompt=True
    )
    messages = tuple(Message(role=turn["role"], parts=(Text(text=turn["content"]),)) for turn in turns)
    ours = RENDERERS[name].render(Generation(messages=messages, tools=offered))
    assert list(ours.tokens) == list(stock)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    pieces=st.lists(
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "<", "|", "im_end", "|>", "<turn>", "[INST]", "é", "\n", "\ufdd0"]
        )
    ),
)
def test_hostile_text_comes_out_as_the_text_it_is(name, pieces):
    text = "x" + "".join(pieces) + "x"
    wrapped = WRAPPED[name]
    tokens = (
        RENDERERS[name].render(Generation(messages=(Message(role="user", parts=(Text(text=text),)),))).tokens
    )
    clean = (
        RENDERERS[name].render(Generation(messages=(Message(role="user", parts=(Text(text="xx"),)),))).tokens
    )
    assert text.replace("\ufdd0", "\ufffd") in wrapped.decode(tokens)
    special = set(wrapped.all_special_ids)
    assert [token for token in tokens if token in special] == [token for token in clean if token in special]
