"""The page of `sjd2 play`: prompts are typed, and decoding is watched while it goes on.

`offer` says what can be asked for, `race` decodes by two methods in turn, `player` runs races in one thread,
`frames` draws what is known of an image, `markup` shows it, and `tabs` is the page itself. Only `tabs` knows
Gradio.
"""
