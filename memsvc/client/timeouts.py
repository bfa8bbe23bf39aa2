"""How long calls wait unless they are told otherwise, in seconds."""

CALL_S = 30.0
#: Transfers of whole texts and archives.
TRANSFER_S = 600.0
#: An answer may have to wait until everything appended before it is encoded.
ANSWER_S = 300.0
