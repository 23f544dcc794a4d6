"""Chat templates with the structures of well-known models, in our own words, and the added tokens they need."""

from pathlib import Path

CHATML_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}"
    "{{- 'Tools:\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nHelp.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'system' %}{%- if not loop.first %}"
    "{{- '<|im_start|>system\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- elif m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}"
    "{%- endif %}{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' }}THINK{{- m.content }}"
    '{%- for call in m.tool_calls or [] %}{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CHATML = CHATML_TOOLS.replace("THINK", "")
# Reasoning, given beside the content or inside it, is rendered after the last user's turn only.
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
) + CHATML_TOOLS.replace(
    "THINK{{- m.content }}",
    "{%- set content, thought = m.content, m.reasoning_content or '' %}"
    "{%- if m.role == 'assistant' and not thought and '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}",
)
LLAMA31 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set sys, rest = messages[0].content | trim, messages[1:] %}"
    "{%- else %}{%- set sys, rest = '', messages %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' + sys + '<|eot_id|>' }}"
    "{%- if tools %}{%- if not rest or rest[0].role != 'user' %}{{- raise_exception('no first user message') }}{%- endif %}"
    "{{- '<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n' }}{%- for t in tools %}{{- t | tojson(indent=4) }}"
    "{{- '\n\n' }}{%- endfor %}{{- rest[0].content | trim + '<|eot_id|>' }}{%- set rest = rest[1:] %}{%- endif %}"
    "{%- for m in rest %}{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call only') }}"
    "{%- endif %}{%- set f = m.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments | tojson + '}<|eot_id|>' }}"
    "{%- else %}{%- set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0].role == 'system' %}{%- set sys, rest = messages[0].content + '\n\n', messages[1:] %}"
    "{%- else %}{%- set sys, rest = '', messages %}{%- endif %}{%- for m in rest %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (sys if loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)
# The tools and the system prompt stand in the last user's turn, and there is no generation prompt.
MISTRAL = (
    "{{- bos_token }}{%- set ns = namespace(last=-1) %}{%- if messages[0].role == 'system' %}"
    "{%- set sys, rest = messages[0].content, messages[1:] %}{%- else %}{%- set sys, rest = none, messages %}{%- endif %}"
    "{%- for m in rest %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in rest %}{%- if m.role == 'user' %}"
    "{%- if tools and loop.index0 == ns.last %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}"
    "{%- endif %}"
    "{{- '[INST] ' + (sys + '\n\n' if loop.last and sys else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}{{- c.function | tojson }}"
    "{{- ', ' if not loop.last }}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}"
    "{%- else %}{{- raise_exception('only user, assistant and tool') }}{%- endif %}{%- endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{% elif m.role == 'tool' %}{{ '<|outputs|>' + m.content + '<|/outputs|>' }}"
    "{% elif m.tool_calls %}{{ '<|Assistant|>' + (m.content or '') + '<|calls|>' }}{% for c in m.tool_calls %}"
    "{{ c.function.name + '\n' + c.function.arguments }}<|/call|>{% endfor %}{{ '<|/calls|>' + eos_token }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>OPENED' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n{% for t in tools %}{{ t | tojson(ensure_ascii=False) + '\n' }}{% endfor %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content.strip() }}{% for c in m.tool_calls or [] %}"
    "{{ '\n<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "{{ '\n<arg_key>' + k + '</arg_key>\n<arg_value>' }}{{ v if v is string else v | tojson }}</arg_value>{% endfor %}"
    "{{ '\n</tool_call>' }}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COHERE = (
    "{{ bos_token }}<|SYSTEM|>{{ messages[0].content if messages[0].role == 'system' else 'You are Command.' }}<|END_TURN|>"
    "{% for m in messages %}{% if m.role == 'user' %}<|USER|>{{ m.content }}<|END_TURN|>{% elif m.role == 'assistant' %}"
    "<|CHATBOT|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|><|END_TURN|>{% elif m.role == 'tool' %}"
    "<|SYSTEM|>{{ m.content }}<|END_TURN|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|CHATBOT|>{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role | capitalize + ': ' }}{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
    "{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.role | capitalize + ': ' + m.content + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MARKS = ("{% generation %}", "{% endgeneration %}")
_HEAD, _SAID, _END = "{{ '<|im_start|>assistant\n' }}", "{{ m.content }}", "{{ '<|im_end|>' }}"


def _marked(text):
    return MARKED.replace("A", text + "{{ '\n' }}", 1)


CASES = Path(__file__).parent / "cases"
TEMPLATES = {
    "harmony": (CASES / "02_gptoss_tool_reasoning" / "template.jinja").read_text(),
    "smollm3": (CASES / "09_marks_hold_generation_prompt" / "template.jinja").read_text(),
    "chatml": CHATML,
    "qwen3": QWEN3,
    "llama31": LLAMA31,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "r1": R1.replace("OPENED", "<think>\n"),
    "v3": R1.replace("OPENED", ""),
    "glm": GLM,
    "cohere": COHERE,
    "parts": PARTS,
    "vicuna": VICUNA,
    "marks": _marked(_HEAD + _MARKS[0] + _SAID + _END + _MARKS[1]),
    "marks_without_end": _marked(_HEAD + _MARKS[0] + _SAID + _MARKS[1] + _END),
    "marks_with_header": _marked(_MARKS[0] + _HEAD + _SAID + _END + _MARKS[1]),
    "marks_of_all": _MARKS[0] + _marked(_HEAD + _SAID + _END) + _MARKS[1],
}
ADDED = [
    "<|User|>",
    "<|Assistant|>",
    "<|outputs|>",
    "<|/outputs|>",
    "<|calls|>",
    "<|/call|>",
    "<|/calls|>",
    "[gMASK]",
    "<sop>",
]
ADDED += [
    "<|system|>",
    "<|observation|>",
    "<|SYSTEM|>",
    "<|USER|>",
    "<|CHATBOT|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
]
ADDED += ["<|END_TURN|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>", "[INST]", "[/INST]", "[TOOL_CALLS]"]
ADDED += ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<think>", "</think>"]
ADDED += ["<tool_call>", "</tool_call>", "<|start|>", "<|message|>", "<|channel|>", "<|call|>"]
# What ends an assistant's turn; GLM's ends where the next role's token comes, which is that role's.
ENDS = dict.fromkeys(TEMPLATES, "<|im_end|>") | {"llama31": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
ENDS |= {"glm": "", "cohere": "<|END_TURN|>", "parts": "<end_of_utterance>", "harmony": "<|return|>"}
