"""`fastdraft bench serve`: a running SGLang or vLLM server, what is measured in it, and how that is shown."""
