# Hot path: free @njit functions.
"""The keys and words of Binance's messages that the scanner reads, as `text_hash` makes them."""

from __future__ import annotations

from typing import Final

from feeds.inner import inner
from feeds.venues.json_scan import text_hash

K_STREAM: Final = text_hash("stream")
K_DATA: Final = text_hash("data")
K_E: Final = text_hash("e")
K_EVENT: Final = text_hash("E")
K_ENGINE: Final = text_hash("T")
K_S: Final = text_hash("s")
K_SYMBOL: Final = text_hash("symbol")
K_PS: Final = text_hash("ps")
K_PAIR: Final = text_hash("pair")
K_FIRST: Final = text_hash("U")
K_LAST: Final = text_hash("u")
K_PREVIOUS: Final = text_hash("pu")
K_LAST_UPDATE: Final = text_hash("lastUpdateId")
K_LB: Final = text_hash("b")
K_LA: Final = text_hash("a")
K_UB: Final = text_hash("B")
K_UA: Final = text_hash("A")
K_BIDS: Final = text_hash("bids")
K_ASKS: Final = text_hash("asks")
K_TRADE: Final = text_hash("t")
K_PRICE: Final = text_hash("p")
K_QUANTITY: Final = text_hash("q")
K_MAKER: Final = text_hash("m")
K_X: Final = text_hash("X")
V_DEPTH: Final = text_hash("depthUpdate")
V_TRADE: Final = text_hash("trade")
V_AGG: Final = text_hash("aggTrade")
V_TICKER: Final = text_hash("bookTicker")
V_MARKET: Final = text_hash("MARKET")
LEN_LAST_UPDATE: Final = len("lastUpdateId")
LEN_DEPTH: Final = len("depthUpdate")
LEN_TICKER: Final = len("bookTicker")


@inner("boolean(int64)")
def is_known(key):  # type: ignore[no-untyped-def]
    """Does the scanner read this key? Then a value of another type is not to be passed over."""
    if key == K_STREAM or key == K_DATA or key == K_E or key == K_EVENT or key == K_ENGINE:
        return True
    if key == K_S or key == K_SYMBOL or key == K_PS or key == K_PAIR or key == K_FIRST:
        return True
    if key == K_LAST or key == K_PREVIOUS or key == K_LAST_UPDATE or key == K_X:
        return True
    if key == K_LB or key == K_LA or key == K_UB or key == K_UA or key == K_MAKER:
        return True
    if key == K_BIDS or key == K_ASKS or key == K_TRADE or key == K_PRICE:
        return True
    return key == K_QUANTITY
