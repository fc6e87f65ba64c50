"""The tokens that stand for no text, spelled as DeepSeek-V3's tokenizer spells them, and how they frame a chat."""

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
FIM_BEGIN_TOKEN = "<｜fim▁begin｜>"
FIM_HOLE_TOKEN = "<｜fim▁hole｜>"
FIM_END_TOKEN = "<｜fim▁end｜>"
USER_TOKEN = "<｜User｜>"
ASSISTANT_TOKEN = "<｜Assistant｜>"
TOOL_TOKENS = (
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    "<｜tool▁sep｜>",
)
FIRST_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)  # their ids are 0, 1, 2, as published
# These take the ids behind the last merge, in the published order.
LAST_TOKENS = (
    *(FIM_HOLE_TOKEN, FIM_BEGIN_TOKEN, FIM_END_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, "<|EOT|>"),
    *TOOL_TOKENS,
)
CONTROL_TOKENS = (*FIRST_TOKENS, *LAST_TOKENS)

# Jinja, for transformers and the servers that read tokenizer_config.json. Calls and outputs of tools come in groups; an
# answer that follows tool outputs has no mark of its own.
CHAT_TEMPLATE = "".join(
    line.strip()
    for line in """
{%- set state = namespace(outputs=0) -%}
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}
    {{- '' if loop.first else '\\n\\n' -}}{{- message.content -}}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role != 'tool' and state.outputs -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
    {%- if message.role == 'user' -%}{{- '<｜User｜>' ~ message.content -}}
    {%- elif message.role == 'assistant' and message.tool_calls -%}
        {{- '<｜Assistant｜>' ~ (message.content or '') ~ '<｜tool▁calls▁begin｜>' -}}
        {%- for call in message.tool_calls -%}
            {{- '' if loop.first else '\\n' -}}
            {{- '<｜tool▁call▁begin｜>' ~ call.type ~ '<｜tool▁sep｜>' ~ call.function.name -}}
            {{- '\\n```json\\n' ~ call.function.arguments ~ '\\n```<｜tool▁call▁end｜>' -}}
        {%- endfor -%}
        {{- '<｜tool▁calls▁end｜>' ~ eos_token -}}
    {%- elif message.role == 'assistant' -%}
        {{- ('' if state.outputs else '<｜Assistant｜>') ~ message.content ~ eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '\\n' if state.outputs else '<｜tool▁outputs▁begin｜>' -}}
        {{- '<｜tool▁output▁begin｜>' ~ message.content ~ '<｜tool▁output▁end｜>' -}}
    {%- endif -%}
    {%- set state.outputs = state.outputs + 1 if message.role == 'tool' else 0 -%}
{%- endfor -%}
{%- if state.outputs -%}{{- '<｜tool▁outputs▁end｜>' -}}
{%- elif add_generation_prompt -%}{{- '<｜Assistant｜>' -}}
{%- endif -%}
""".splitlines()
)
