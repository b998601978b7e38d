"""Images in front of a language model: pixels to tiles, tiles to the rows that take the places of tokens. Needs numpy, and Pillow
once an image is read.
"""
