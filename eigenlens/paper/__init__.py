"""The reproduction of arXiv 2404.03147: its released code, and the studies that ask its questions.

This wing stands above the toolkit; of the rest, only the command line imports it.
"""
