"""`fastlm report`: runs as one page of curves, samples and figures."""
