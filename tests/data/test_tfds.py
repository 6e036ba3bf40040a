"""TFDS datasets: read without TensorFlow, and whatever cannot be read is one clear line."""

import subprocess
import sys


def test_tfds_dataset_is_read_without_tensorflow(tmp_path):
    program = """
import sys
import numpy as np
import tensorflow_datasets as tfds
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.data.corpora import open_corpus

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int32})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager):
        sizes = {"train": ("train", 700), "validation": ("held", 3), "unsupervised": ("other", 2)}
        return {split: self._generate_examples(*size) for split, size in sizes.items()}
    def _generate_examples(self, name, count):
        for index in range(count):
            yield index, {"text": f"{name} caf\\u00e9 {index}", "id": index}

folder = sys.argv[1]
Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
found = []
for config in (DataConfig(path="tfds:tiny", tfds_data_dir=folder), DataConfig(path=f"tfds:{folder}/tiny/1.0.0")):
    corpus = open_corpus(config)
    assert corpus.splits == ("train", "valid"), corpus
    assert sorted(corpus.documents("train")) == sorted(f"train caf\\u00e9 {i}" for i in range(700))
    assert sorted(corpus.documents("valid")) == [f"held caf\\u00e9 {i}" for i in range(3)]
    assert corpus.selection.taken == {"train": ("train",), "valid": ("validation",)}
    assert corpus.selection.lines()[3].startswith("  left out: 'unsupervised' (not the name of a split that is read:")
    found.append(corpus.fingerprint)
assert found[0] == found[1]
for path, field, message in (
    ("tfds:nothing_here", "text", "no dataset that can be read"),
    (f"tfds:{folder}", "text", "no dataset that can be read"),
    ("tfds:tiny", "body", "no field 'body'"),
    ("tfds:tiny", "id", "is not text"),
):
    try:
        list(open_corpus(DataConfig(path=path, tfds_data_dir=folder, text_field=field)).documents("train"))
        raise SystemExit(f"{path} was read")
    except UserError as error:
        assert message in str(error) and "\\n" not in str(error), error
assert "tensorflow" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
