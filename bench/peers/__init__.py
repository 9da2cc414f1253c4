"""The other side: what fastlm is measured against."""
