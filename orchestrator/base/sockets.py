"""Whether anything answers at an address, found out in seconds: clients of a cluster or a server try for minutes."""

import socket
import threading

GRPC_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
SETTINGS = 4  # the type of the frame that a gRPC server answers with, in its fourth byte


def why_silent(host: str, port: int, timeout_s: float, *, grpc: bool = False) -> str | None:
    """Why nothing can be reached there, in a few words; None if something answers. grpc: it must be a gRPC server."""
    found: list[str | None] = []
    seconds = f"no answer within {timeout_s:g} s"

    def ask() -> None:
        try:
            with socket.create_connection((host, port), timeout_s) as connection:
                if not grpc:
                    found.append(None)
                    return
                connection.sendall(GRPC_HELLO)
                answer = connection.recv(4)
                found.append(None if answer[3:] == bytes([SETTINGS]) else "what answers there is not Ray")
        except TimeoutError:
            found.append(seconds)
        except OSError as error:
            found.append((error.strerror or str(error)).lower())

    # a thread, because looking up a name has no timeout
    thread = threading.Thread(target=ask, name="try-address", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else seconds
