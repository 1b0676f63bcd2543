"""Reads video streams with PyAV: the list of frames, when they are shown, and their pixels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from higen.errors import OutputError
from higen.media.animations import Each
from higen.media.files import check_pixels
from higen.media.geometry import pixel_aspect, shown
from higen.media.timing import last_gap

__all__ = ["Undecodable", "VideoStream"]

_DEMUXERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,ogg,asf,flv,h264,hevc"
_INDEXED = ("mov", "matroska")  # containers with their length in the header
_REORDERED = 16
"""Decoding order and display order differ by at most this many frames (H.264, A.3.1: MaxDpbFrames)."""

_LOOKED_AT = 16
"""Minimum number of frames to decode, so that time stamps that run backwards are noticed."""


class Undecodable(OutputError):
    """Wanted frames cannot be decoded. Other frames of the file may be usable."""


class _Jumbled(Exception):
    """The time stamps of the decoded frames do not ascend. Decoded frames come in display order."""


class VideoStream:
    """The first video stream of a file that is not a cover picture.

    times      float64 [n], start of each frame in seconds, ascending; `end`: end of the last frame
    rate       frames a second, from the header; 0 if it has none
    payload    the file's comment
    complete   whether the file has everything that its header announces
    """

    def __init__(self, path: Path) -> None:
        """Reads the packets without decoding them. Raises what PyAV raises, and OutputError with the reason."""
        self.path = path
        with self._opened() as (container, stream):
            self._aspect = pixel_aspect(stream)
            self.rate = float(stream.average_rate or 0)
            tags = {key.lower(): text for key, text in container.metadata.items()}
            self.payload = tags.get("comment", "")
            self._stamped, self.times, self.end = self._scan(container, stream)
            self.complete = self._is_complete(container, stream)
            self.size = self._shown_size(stream)

    def pictures(self, chosen: Sequence[int], hold: float, each: Each) -> list[NDArray[np.uint8]]:
        """The results of `each` for the `chosen` frames, which are in ascending order; see `Each`.

        `each` may be called again from the first frame: bad time stamps are found only while the frames are read. A
        frame that cannot be decoded is replaced by the one before it (the first one: after it), if that is at most
        `hold` seconds away. Otherwise this raises Undecodable.
        """
        if self._stamped:
            with suppress(_Jumbled):
                return self._pictures(chosen, hold, each, self._frames_from(chosen[0]))
        return self._pictures(chosen, hold, each, self._counted())

    def _pictures(
        self,
        chosen: Sequence[int],
        hold: float,
        each: Each,
        frames: Iterator[tuple[int, Any]],
    ) -> list[NDArray[np.uint8]]:
        found: list[NDArray[np.uint8]] = []
        before: tuple[int, Any] | None = None
        for looked_at, (index, frame) in enumerate(frames, 1):
            while len(found) < len(chosen) and chosen[len(found)] < index:
                stand_in = (index, frame) if before is None else before
                if not self._near(chosen[len(found)], stand_in[0], hold):
                    _look_on(frames, _LOOKED_AT)
                    seconds = self.times[chosen[len(found)]] - self.times[0]
                    raise Undecodable(f"frames are missing at {seconds:.2f} s")
                found.append(each(len(found), shown(stand_in[1], self._aspect)))
            while len(found) < len(chosen) and chosen[len(found)] == index:
                found.append(each(len(found), shown(frame, self._aspect)))
            if len(found) == len(chosen):
                _look_on(frames, _LOOKED_AT - looked_at)
                return found
            before = (index, frame)
        while len(found) < len(chosen):
            if before is None:
                raise Undecodable("no frame can be decoded")
            if not self._near(chosen[len(found)], before[0], hold):
                raise Undecodable(f"{len(found)} of {len(chosen)} frames can be decoded")
            found.append(each(len(found), shown(before[1], self._aspect)))
        return found

    def _near(self, wanted: int, index: int, hold: float) -> bool:
        return bool(abs(self.times[wanted] - self.times[index]) <= hold)

    def _frames_from(self, first: int) -> Iterator[tuple[int, Any]]:
        """The frames with their indices, from a key frame at or before `first`.

        Some formats are indexed by decoding time (AVI, MPEG-4 part 2 in MP4) or not at all. Seeking then ends after the
        frame or fails. In that case the frames are read from further back, or from the start of the file.
        """
        import av

        for start in (first, first - _REORDERED):
            if start > 0:
                with suppress(av.FFmpegError):
                    frames = self._stamped_frames(start)
                    found = next(frames, None)
                    if found is not None and found[0] <= first:
                        return chain([found], frames)
        return self._stamped_frames(0)

    def _stamped_frames(self, start: int) -> Iterator[tuple[int, Any]]:
        """The frames with their indices, from the position where a seek to frame `start` ends. Raises _Jumbled."""
        with self._opened() as (container, stream):
            if start:
                container.seek(int(self.times[start] / stream.time_base), stream=stream)
            last = -np.inf
            for frame in _deinterlaced(_decoded(container, stream), stream):
                if frame.pts is None:
                    raise _Jumbled
                time = float(frame.pts * frame.time_base)
                if time <= last:
                    raise _Jumbled
                last = time
                yield self._nearest(time), frame

    def _counted(self) -> Iterator[tuple[int, Any]]:
        """All frames as they are decoded, from the start. Their indices are counted, not found from time stamps."""
        with self._opened() as (container, stream):
            last = len(self.times) - 1
            for index, frame in enumerate(_deinterlaced(_decoded(container, stream), stream)):
                yield min(index, last), frame

    def _nearest(self, time: float) -> int:
        after = min(int(np.searchsorted(self.times, time)), len(self.times) - 1)
        before = max(after - 1, 0)
        return before if time - self.times[before] < self.times[after] - time else after

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        import av

        # Only the listed demuxers and local files: a playlist could open any address.
        options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
        try:
            container = av.open(f"file:{self.path.absolute()}", options=options, **_metadata_options())
        except (av.ArgumentError, av.InvalidDataError) as error:
            raise OutputError("it is corrupt, or not in a supported video format") from error
        with container:
            stream = _video_stream(container)
            stream.thread_type = "AUTO"
            yield container, stream

    def _scan(self, container: Any, stream: Any) -> tuple[bool, NDArray[np.float64], float]:
        """Whether the packets have time stamps, the start of each frame, and the end of the last one."""
        # Frames that an edit list cuts off (a trimmed MP4) are decoded but not shown.
        found = [_Packet(p.pts, p.duration, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
        self._stored = len(found)
        packets = [packet for packet in _from_key_frame(found) if not packet.is_hidden]
        if not packets:
            raise OutputError("no frame in it")
        if any(packet.stamp is None for packet in packets):
            rate = float(stream.average_rate or stream.base_rate or 0)
            if not rate:
                raise OutputError("neither time stamps nor a frame rate in it")
            return False, np.arange(len(packets)) / rate, len(packets) / rate
        packets.sort(key=lambda packet: packet.stamp or 0)
        times = np.array([packet.stamp for packet in packets], dtype=np.float64) * float(stream.time_base)
        last = float((packets[-1].lasting or 0) * stream.time_base) or last_gap(times)
        return True, times, float(times[-1]) + (last or (1 / self.rate if self.rate else 0.0))

    def _is_complete(self, container: Any, stream: Any) -> bool:
        """Whether the file is not cut off: a cut-off MP4 announces more frames, a cut-off MKV a longer time."""
        import av

        if not container.format.name.startswith(_INDEXED):
            return True
        if container.format.name.startswith("mov") and stream.frames > self._stored:
            return False
        announced = float((container.duration or 0) / av.time_base) if len(container.streams) == 1 else 0.0
        missing = announced - (self.end - float(self.times[0]))
        return missing <= 0.9 * (last_gap(self.times) or missing)

    def _shown_size(self, stream: Any) -> tuple[int, int]:
        context = stream.codec_context
        width = max(1, round(context.width * self._aspect))
        check_pixels(width, context.height)
        return width, context.height


def _metadata_options() -> dict[str, Any]:
    """Options for metadata: text in an unknown encoding must not fail. PyAV before 19 needs an option for this."""
    import av

    return {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


class _Packet(NamedTuple):
    stamp: int | None
    lasting: int | None
    is_key: bool
    is_hidden: bool


def _from_key_frame(packets: list[_Packet]) -> list[_Packet]:
    """The packets without those before the first key frame, which cannot be decoded.

    Recordings that start in the middle of a broadcast have them. A format without key frames keeps all packets.
    """
    first = next((at for at, packet in enumerate(packets) if packet.is_key), 0)
    if not first:
        return packets
    start = packets[first].stamp
    return [p for p in packets[first:] if start is None or p.stamp is None or p.stamp >= start]


def _look_on(frames: Iterator[tuple[int, Any]], count: int) -> None:
    """Decode up to this many more frames and ignore decoding errors. Raises _Jumbled."""
    import av

    with suppress(av.FFmpegError):
        deque(islice(frames, max(count, 0)), maxlen=0)


def _video_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture. Raises OutputError."""
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    films = [stream for stream in container.streams.video if not stream.disposition & still]
    if not films:
        others = ", ".join(sorted({stream.type for stream in container.streams}))
        cover = " (only a cover picture)" if container.streams.video else ""
        raise OutputError(f"no video in it{cover or (f' (only {others})' if others else '')}")
    stream = next((film for film in films if film.frames != 1), films[0])
    if stream.codec_context is None:  # PyAV before 18.1 crashes if such a stream is decoded
        raise OutputError("its codec is unknown")
    return stream


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The stream's frames in display order. VP8 and VP9 keep their alpha, which FFmpeg's own decoders drop."""
    import av

    name = f"libvpx-{stream.codec_context.name}".replace("libvpx-vp8", "libvpx")
    has_alpha = {key.lower(): text for key, text in stream.metadata.items()}.get("alpha_mode") == "1"
    if not (has_alpha and name in ("libvpx", "libvpx-vp9") and name in av.codecs_available):
        yield from container.decode(stream)
        return
    context: Any = av.CodecContext.create(name, "r")
    for packet in container.demux(stream):
        if packet.size:
            yield from context.decode(packet)
    yield from context.decode(None)


def _deinterlaced(frames: Iterable[Any], stream: Any) -> Iterator[Any]:
    """Deinterlaces interlaced frames with FFmpeg's bwdif and passes on the others. Each frame gives one, in order."""
    waiting: deque[Any] = deque()
    graph = None
    for frame in frames:
        if graph is None:
            if not frame.interlaced_frame:
                yield frame
                continue
            graph = _Bwdif(frame, stream)
        waiting.append(frame)
        yield from graph.given(frame, waiting)
    if graph is not None:
        yield from graph.given(None, waiting)


class _Bwdif:
    """FFmpeg's deinterlacing filter."""

    def __init__(self, frame: Any, stream: Any) -> None:
        import av

        self.graph = av.filter.Graph()
        source = self.graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
        )
        steps = [source, self.graph.add("bwdif", "mode=send_frame:deint=interlaced"), self.graph.add("buffersink")]
        for one, next_one in pairwise(steps):
            one.link_to(next_one)
        self.graph.configure()

    def given(self, frame: Any, waiting: deque[Any]) -> Iterator[Any]:
        """Push `frame` (None: the end) and yield the frames that are ready, with the input frames' time stamps."""
        import av

        self.graph.push(frame)
        while waiting:
            try:
                made = self.graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            of = waiting.popleft()
            made.pts, made.time_base = of.pts, of.time_base
            yield made
