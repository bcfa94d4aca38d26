import sys
from pathlib import Path

# The tests are no package (importlib mode), so that the builder of synthetic runs is found by its folder.
sys.path.insert(0, str(Path(__file__).parent))
