"""The quicker reader gives what gguf's gives, and is gone after its block."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import transformers

from kvp.models.gguf_reader import Reader, quick_reader


def written(file, endian=gguf.GGUFEndian.LITTLE):
    writer = gguf.GGUFWriter(file, "llama", endianess=endian)
    writer.add_uint32("a.number", 7)
    writer.add_array("a.words", ["", "fox", "wörter"])
    writer.add_array("a.scores", [0.5, -1.25])
    writer.add_bool("a.flag", True)
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("some.weight", matrix if endian is gguf.GGUFEndian.LITTLE else matrix.byteswap())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("endian", list(gguf.GGUFEndian))
def test_reads_as_gguf_does(endian, tmp_path):
    file = written(tmp_path / "some.gguf", endian)
    slow, quick = gguf.GGUFReader(file), Reader(file)
    assert list(slow.fields) == list(quick.fields)
    for name, field in slow.fields.items():
        assert quick.fields[name].contents() == field.contents(), name
        assert quick.fields[name].types == field.types
        assert [part.dtype for part in quick.fields[name].parts] == [part.dtype for part in field.parts]
    (one,), (other,) = slow.tensors, quick.tensors
    assert (one.name, one.shape.tolist(), one.data_offset) == (
        other.name,
        other.shape.tolist(),
        other.data_offset,
    )
    np.testing.assert_array_equal(one.data, other.data)


def test_transformers_takes_it_within_the_block_alone(tmp_path, monkeypatch):
    """A version of transformers that reads in another way would make the block useless without a word."""
    file, made, before = written(tmp_path / "some.gguf"), [], (gguf.GGUFReader, gguf.get_tensor_name_map)

    def fail(self, path):
        made.append(path)
        raise EOFError

    monkeypatch.setattr(Reader, "__init__", fail)
    with pytest.raises(EOFError), quick_reader():
        transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=file.name, trust_remote_code=False)
    assert made == [str(file)]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
