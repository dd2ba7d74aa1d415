"""SGLang's engines in this process: scheduler, detokenizer and frontend are threads."""
