"""A very small language model and the English it is trained on.

``lexicon`` holds the words, ``stories`` writes stories and questions about them, ``dialogue``
wraps both in the question/answer form the model talks in, ``checkpoint`` makes the tokenizer and
the Hugging Face directory, ``training`` and ``evaluation`` do what they say.
"""
