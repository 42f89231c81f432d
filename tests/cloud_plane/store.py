"""S3, as much of it as boto3 needs to list, read, write and delete: objects are files below one directory."""

import re
import shutil
import uuid
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

LISTED = 500
"""Entries per page of a listing: fewer than AWS's 1000, so that paging is exercised by small tests too."""


class Store:
    def __init__(self, root):
        self.root = Path(root)
        self.parts = {}

    def path(self, uri):
        """The file or directory behind an s3:// address."""
        return self.root / uri.removeprefix("s3://").rstrip("/")

    def put(self, uri, content=b""):
        path = self.path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def keys(self, bucket="", prefix=""):
        """Keys of the objects below a prefix, sorted as S3 sorts them."""
        root = self.root / bucket
        found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        return sorted(key for key in found if key.startswith(prefix))

    def copy_out(self, uri, folder):
        """Objects below a prefix into a directory, as the service fills a channel; the number of them."""
        source = self.path(uri)
        if not source.exists():
            return 0
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return sum(p.is_file() for p in source.rglob("*"))

    def copy_in(self, folder, uri):
        """A directory's files below a prefix; as in S3, what is there already stays."""
        if any(p.is_file() for p in Path(folder).rglob("*")):
            shutil.copytree(folder, self.path(uri), dirs_exist_ok=True, symlinks=False)

    def answer(self, method, target, headers, body):
        """Status, headers and body for one REST request, path style."""
        url = urlsplit(target)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        folder, path = self.root / bucket, self.root / bucket / key
        if method == "PUT" and not key:
            folder.mkdir(parents=True)
            return 200, {}, b""
        if not folder.is_dir():
            return _error(404, "NoSuchBucket", "The specified bucket does not exist", method)
        if not key:
            if method == "POST" and "delete" in query:
                for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                    self._remove(folder / name)
                return 200, {}, b"<DeleteResult/>"
            return (200, {}, b"") if method == "HEAD" else (200, {}, self._list(bucket, query))
        if method == "POST":
            return self._multipart(query, path, bucket, key)
        if method == "PUT":
            if "x-amz-decoded-content-length" in headers:
                body = _unchunk(body)
            if "partNumber" in query:
                self.parts[query["uploadId"]][int(query["partNumber"])] = body
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(body)
            return 200, {"ETag": '"0"'}, b""
        if method == "DELETE":
            self._remove(path)
            return 204, {}, b""
        if not path.is_file():
            return _error(404, "NoSuchKey", "The specified key does not exist.", method)
        return 200, {"ETag": '"0"', "Content-Length": str(path.stat().st_size)}, b"" if method == "HEAD" else (
            path.read_bytes()
        )  # fmt: skip

    def _multipart(self, query, path, bucket, key):
        if "uploads" in query:
            name = uuid.uuid4().hex
            self.parts[name] = {}
            names = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId>"
            return 200, {}, f"<InitiateMultipartUploadResult>{names}</InitiateMultipartUploadResult>".encode()
        parts = self.parts.pop(query["uploadId"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(parts[number] for number in sorted(parts)))
        return 200, {}, b"<CompleteMultipartUploadResult/>"

    def _list(self, bucket, query):
        keys = self.keys(bucket, query.get("prefix", ""))
        start = int(query.get("continuation-token", 0))
        page = keys[start : start + LISTED]
        more = start + LISTED < len(keys)
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(self.root / bucket / key).stat().st_size}</Size></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{start + LISTED}</NextContinuationToken>" if more else ""
        head = f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        return f"<ListBucketResult>{head}{rows}</ListBucketResult>".encode()

    def _remove(self, path):
        path.unlink(missing_ok=True)
        for parent in path.parents:  # S3 has no empty directories, but a bucket stays
            if parent == self.root or parent.parent == self.root or any(parent.iterdir()):
                break
            parent.rmdir()


def _error(status, code, message, method):
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return status, {}, b"" if method == "HEAD" else body


def _unchunk(body):
    content = b""
    while body:
        head, _, body = body.partition(b"\r\n")
        size = int(head.partition(b";")[0], 16)
        if size == 0:
            break
        content, body = content + body[:size], body[size + 2 :]
    return content
