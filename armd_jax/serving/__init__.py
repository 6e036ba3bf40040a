"""A server of texts over HTTP: an OpenAI-compatible API, a page that shows every call, and the batches behind both."""
