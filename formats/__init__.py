"""Files that people bring, as records: one parser per format.

    file -> rows (rows.py) -> Example, by its fields (parsers.py) -> Dialogue | Ranking | Prompt (records.py)
"""
from formats.reading import read_dialogues, read_files, read_prompts, read_rankings
from formats.records import BadRow, Dialogue, Message, Messages, Prompt, Ranking, Record, Report, Uninformative
