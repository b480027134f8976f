"""Reading, writing and treating audio."""

import math
import os

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from codec_bridge import InputError, audio
from codec_bridge.audio import Audio


def tone(seconds=1.0, rate=44100, channels=1, hertz=440.0, level=0.3):
    time = np.arange(int(seconds * rate)) / rate
    wave = [level * np.sin(2 * np.pi * hertz * (c + 1) * time) for c in range(channels)]
    return Audio(np.array(wave, np.float32), rate)


def main_frequency(signal):
    spectrum = np.abs(np.fft.rfft(signal.samples[0] * np.hanning(signal.samples.shape[1])))
    return spectrum.argmax() * signal.rate / signal.samples.shape[1]


@pytest.mark.parametrize(
    ("name", "encoding", "error"),
    [
        ("a.wav", None, 1 / 32768),
        ("a.wav", "PCM_24", 1e-6),
        ("a.wav", "FLOAT", 0.0),
        ("a.flac", None, 1 / 32768),
        ("a.flac", "PCM_24", 1e-6),
    ],
)
def test_lossless_formats_give_the_samples_back(tmp_path, name, encoding, error):
    signal = tone(channels=2)
    audio.write(tmp_path / name, signal, encoding=encoding)
    back = audio.read(tmp_path / name)
    assert back.rate == signal.rate
    assert back.samples.dtype == np.float32
    assert back.samples.shape == signal.samples.shape
    assert np.abs(back.samples - signal.samples).max() <= error


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "a.mp3"])
def test_lossy_formats_keep_the_tone_and_the_length(tmp_path, name):
    signal = tone(seconds=2.0)
    audio.write(tmp_path / name, signal)
    back = audio.read(tmp_path / name)
    assert abs(back.seconds - signal.seconds) < 0.1
    assert abs(main_frequency(back) - 440) < 2
    assert abs(np.std(back.samples) / np.std(signal.samples) - 1) < 0.05


def test_opus_and_mp3_take_any_rate_by_resampling(tmp_path):
    audio.write(tmp_path / "a.opus", tone(rate=44100))
    audio.write(tmp_path / "a.mp3", tone(rate=96000))
    assert audio.read(tmp_path / "a.opus").rate == 48000
    assert audio.read(tmp_path / "a.mp3").rate == 48000


def test_long_vorbis_files_are_written(tmp_path):
    # Given in one piece, libsndfile's encoder overflows its stack on these.
    audio.write(tmp_path / "a.ogg", Audio(np.zeros((2, 3_000_000), np.float32), 48000))
    assert audio.read(tmp_path / "a.ogg").samples.shape == (2, 3_000_000)


def test_samples_beyond_full_scale_are_clipped_in_integer_files(tmp_path):
    loud = Audio(np.array([[2.0, -2.0, 0.5] * 100], np.float32), 8000)
    audio.write(tmp_path / "a.wav", loud)
    audio.write(tmp_path / "b.wav", loud, encoding="FLOAT")
    assert np.abs(audio.read(tmp_path / "a.wav").samples).max() <= 1
    np.testing.assert_array_equal(audio.read(tmp_path / "b.wav").samples, loud.samples)


def test_eight_bits_eight_channels_and_192_khz_are_read(tmp_path):
    signal = tone(seconds=0.5, rate=192_000, channels=8)
    soundfile.write(tmp_path / "a.wav", signal.samples.T, 192_000, subtype="PCM_U8")
    back = audio.read(tmp_path / "a.wav")
    assert back.samples.shape == signal.samples.shape
    assert np.abs(back.samples - signal.samples).max() < 0.01


def _write_wav(path, samples, rate=8000, subtype="FLOAT"):
    soundfile.write(path, np.asarray(samples, np.float32), rate, subtype=subtype)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "no file"),
        (lambda p: p.mkdir(), "not a file"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("not audio at all\n" * 50), "cannot be read as audio"),
        (lambda p: _write_wav(p, np.zeros(0)), "no samples"),
        (lambda p: _write_wav(p, [0, math.nan, 0]), "not finite"),
        (lambda p: _write_wav(p, [0, math.inf, 0]), "not finite"),
        (lambda p: _write_wav(p, np.zeros(99), rate=10), "10 Hz"),
        (lambda p: _write_wav(p, np.zeros(99), rate=2_000_000), "2000000 Hz"),
        (lambda p: _write_wav(p, np.zeros((99, 40))), "40 channels"),
        (lambda p: os.mkfifo(p), "not a file"),
    ],
)
def test_what_is_no_audio_is_refused_in_one_sentence(tmp_path, make, says):
    path = tmp_path / "a.wav"
    make(path)
    with pytest.raises(InputError) as caught:
        audio.read(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_headerless_audio_is_refused(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"\0" * 1000)
    with pytest.raises(InputError, match="headerless"):
        audio.read(tmp_path / "a.raw")


def test_a_length_that_a_header_merely_claims_is_refused_before_decoding(tmp_path):
    path = tmp_path / "a.flac"
    audio.write(path, tone(seconds=0.1))
    content = bytearray(path.read_bytes())
    # The number of samples: 36 bits of STREAMINFO that end 18 bytes after its start.
    content[8 + 13] |= 0x0F
    content[8 + 14 : 8 + 18] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="too many"):
        audio.read(path)


def test_a_truncated_file_gives_what_is_there_or_a_clear_error(tmp_path):
    path = tmp_path / "a.flac"
    audio.write(path, tone())
    content = path.read_bytes()
    for length in (20, 60, len(content) // 2):
        path.write_bytes(content[:length])
        try:
            seconds = audio.read(path).seconds
        except InputError:
            continue
        assert 0 < seconds < 1


@pytest.mark.parametrize(
    ("name", "says"),
    [("a.xyz", ".xyz"), ("a", "no audio format"), ("missing/a.wav", "does not exist")],
)
def test_unusable_output_names_are_refused(tmp_path, name, says):
    with pytest.raises(InputError, match=says):
        audio.write(tmp_path / name, tone())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_encoded_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match="8 channels"):
        audio.write(tmp_path / "a.mp3", tone(channels=8))
    with pytest.raises(InputError, match="not finite"):
        audio.write(tmp_path / "a.wav", Audio(np.full((1, 9), np.nan, np.float32), 8000))
    with pytest.raises(InputError, match="FLOAT"):
        audio.write(tmp_path / "a.flac", tone(), encoding="FLOAT")
    with pytest.raises(InputError, match="nothing to write"):
        audio.write(tmp_path / "a.wav", Audio(np.zeros((1, 0), np.float32), 8000))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_only_on_request(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"precious")
    with pytest.raises(InputError, match="exists"):
        audio.write(path, tone())
    assert path.read_bytes() == b"precious"
    audio.write(path, tone(), overwrite=True)
    assert audio.read(path).seconds == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize(("old", "new"), [(192_000, 24_000), (44_100, 16_000), (8_000, 44_100)])
def test_resampling_keeps_pitch_level_and_duration(old, new):
    signal = tone(rate=old, channels=2)
    converted = audio.resample(signal, new)
    assert converted.rate == new
    assert abs(converted.seconds - signal.seconds) < 2 / new
    assert abs(main_frequency(converted) - 440) < 2
    assert abs(np.std(converted.samples) / np.std(signal.samples) - 1) < 0.01


def test_what_a_codec_decodes_has_a_loudness_too():
    """It is an array of JAX."""
    rate = 8000
    tone = 0.1 * np.sin(np.arange(rate, dtype=np.float32))[None]
    plain, traced = (audio.Audio(samples, rate) for samples in (tone, jnp.asarray(tone)))
    assert audio.loudness(traced) == pytest.approx(audio.loudness(plain))
    assert audio.normalise(traced)[1] == pytest.approx(audio.normalise(plain)[1])


def test_audio_that_would_fill_the_memory_is_not_resampled(monkeypatch):
    monkeypatch.setattr(audio, "MAX_VALUES", 48_000)
    slow = audio.Audio(np.zeros((2, 4000), np.float32), 1000)
    with pytest.raises(InputError, match="lasts 4 seconds, too long at 24000 Hz"):
        audio.resample(slow, 24_000)
    assert audio.resample(slow, 6000).samples.shape == (2, 24_000)


def test_resampling_to_an_absurd_rate_is_refused():
    with pytest.raises(InputError, match="0 Hz"):
        audio.resample(tone(), 0)


def test_mono_averages_and_stereo_makes_two_channels():
    eight = tone(channels=8)
    np.testing.assert_allclose(audio.mono(eight).samples[0], eight.samples.mean(0), atol=1e-6)
    assert audio.stereo(eight).samples.shape == (2, 44100)
    one = tone()
    np.testing.assert_array_equal(audio.stereo(one).samples, np.repeat(one.samples, 2, 0))


def test_loudness_of_the_reference_tone():
    # BS.1770: a full-scale 997 Hz sine in one channel measures -3.01 LUFS. EBU Tech 3341 gives
    # meters a tolerance of 0.1.
    assert abs(audio.loudness(tone(3, 48000, hertz=997, level=1.0)) + 3.01) < 0.1


@pytest.mark.parametrize("rate", [4000, 8000, 192_000])
def test_loudness_hardly_depends_on_the_rate(rate):
    signal = tone(3, rate, hertz=500)
    assert abs(audio.loudness(signal) - audio.loudness(tone(3, 48000, hertz=500))) < 0.5


def test_normalising_reaches_the_loudness_and_can_be_undone():
    signal = tone(2, channels=2)
    normal, gain = audio.normalise(signal, -24.0)
    assert abs(audio.loudness(normal) + 24) < 0.01
    restored, _ = audio.apply_gain(normal, -gain)
    np.testing.assert_allclose(restored.samples, signal.samples, atol=1e-6)


def test_the_peak_limits_the_gain():
    samples = np.zeros((1, 48000), np.float32)
    samples[0, ::4800] = 0.5  # clicks: quiet for their height
    normal, gain = audio.normalise(Audio(samples, 48000), -10.0)
    assert np.abs(normal.samples).max() <= 1.0
    assert abs(gain - 20 * math.log10(2)) < 1e-6


@pytest.mark.parametrize("samples", [np.zeros((1, 8000)), np.full((1, 1000), 0.1)])
def test_undefined_loudness_means_no_gain(samples):
    signal = Audio(samples.astype(np.float32), 8000)
    normal, gain = audio.normalise(signal)
    assert gain == 0.0
    np.testing.assert_array_equal(normal.samples, signal.samples)


def test_eight_channels_have_a_loudness():
    normal, _ = audio.normalise(tone(channels=8))
    assert abs(audio.loudness(normal) + 24) < 0.01


@pytest.mark.parametrize("semitones", [12, -12, 3.5])
def test_pitch_shift_moves_the_pitch_and_keeps_the_length(semitones):
    shifted = audio.pitch_shift(tone(rate=16000, channels=2), semitones)
    assert shifted.samples.shape == (2, 16000)
    assert abs(main_frequency(shifted) / (440 * 2 ** (semitones / 12)) - 1) < 0.01


def test_pitch_shift_of_very_short_audio_and_by_nothing():
    short = tone(seconds=0.02, rate=8000)
    assert audio.pitch_shift(short, 5).samples.shape == short.samples.shape
    assert audio.pitch_shift(short, 0) is short
    with pytest.raises(InputError, match="13 semitones"):
        audio.pitch_shift(short, 13)
