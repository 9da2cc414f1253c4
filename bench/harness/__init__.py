"""How it is measured: timing, watched runs, profiles, the text, stand-ins for absent packages."""
