"""A server of models: requests join a decoder at work (`engine`), over HTTP as OpenAI's clients speak it (`app`)."""
