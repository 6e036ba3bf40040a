"""Using a trained model: likelihoods, the jitted sampler, and the `LanguageModel` handle around both."""
