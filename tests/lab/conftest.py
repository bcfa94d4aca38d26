import sys
from pathlib import Path

# Tests are imported one by one, not as packages; this lets those of the lab share their module shapes.
sys.path.insert(0, str(Path(__file__).parent))
