"""The run file as a JSON schema, for editors: completion, descriptions and validation while typing.

configs/schema.json is its output; `python -m lmscale.config.json_schema > configs/schema.json` renews it.
"""

import json
import sys
from typing import Any

from lmscale.config.schema import SECTIONS, RunConfig


def json_schema() -> dict[str, Any]:
    """Draft 2020-12. A section may also be the name of a file; four sections are required."""
    schema = RunConfig.model_json_schema(by_alias=True)
    for definition in (schema, *schema["$defs"].values()):
        for declared in definition["properties"].values():
            declared.pop("title", None)  # the key in other letters
    corpora = schema["$defs"]["DataConfig"]["properties"]["corpora"]
    corpora["items"] = {"anyOf": [corpora["items"], {"type": "string"}]}
    for section in SECTIONS:
        declared = schema["properties"][section]
        mapping = {"$ref": declared["$ref"]} if "$ref" in declared else declared
        schema["properties"][section] = {"anyOf": [mapping, {"type": "string"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def text() -> str:
    """The contents of configs/schema.json."""
    return json.dumps(json_schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
