"""What the project needs, one requirement a line: `requirements.py EXTRA...`, in the folder of pyproject.toml.

pip cannot install a project's requirements without the project, and then any change of the code would install torch
again.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
