"""An HTTP server with the API that OpenAI clients speak, over one ``AsyncLLM``. See ``docs/server.md``."""
