"""From prompts to tokens: tokenizer, sampler, engine."""
