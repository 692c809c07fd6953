"""The ledger on disk, and its custody: what lies beside the file so that a loss of it is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lepton_fl.errors import PolicyRefused, Unwritable, VerificationFailed
from lepton_fl.files import write_atomic
from lepton_fl.privacy.ledger import receipts
from lepton_fl.privacy.ledger.chain import (
    HEAD,
    RESTORE,
    SLOT,
    Custody,
    is_settled,
    noted_end,
    read_key,
    unusable,
)
from lepton_fl.privacy.ledger.entries import RecoveredCharge, Recovery
from lepton_fl.privacy.ledger.ledger import AnyLedger
from lepton_fl.privacy.ledger.receipts import NO_ENTRY, Head, Receipt
from lepton_fl.secagg.encoding import encode
from lepton_fl.secagg.identity import IdentityKey


class Ledger(AnyLedger):
    """The ledger in one SQLite file (WAL, synchronous FULL), its companions beside it, all of mode 0600."""

    def __init__(self, path: Path, *, recovering: bool = False) -> None:
        """Open, or begin, the ledger at `path`, and verify it: every entry, its end, the receipts kept here.

        Guarantee: a ledger that lacks an entry which this site has relied on, or in which a bit of one has
        changed, does not open.

        Args:
            path: The file. Companions have its name and another suffix.
            recovering: What is missing by the companions is not refused: for `recover` alone.

        Raises:
            ConfigError: the file cannot be opened, or is not a ledger of this format.
            VerificationFailed: it was changed, is gone, or has lost entries.
        """
        self._custody = Custody(path.absolute())
        self._recovering = recovering
        # Absolute: SQLite takes a relative `:memory:` for no file at all.
        super().__init__(path.absolute())
        try:
            self._kept = receipts.Kept(self._custody.receipts)
            if not recovering:
                self._check_end()
                self.check(self._kept)
        except OSError as error:
            self.close()
            raise self._unusable(error) from None
        except BaseException:
            self.close()
            raise

    def keep(self, receipt: Receipt) -> None:
        """Keep a receipt of this site, durably, and compare it with the ledger.

        One that shows what the ledger does not have is kept as well: the ledger does not open again before
        it was recovered. The caller has asked the roster whose key signed it.

        Raises:
            VerificationFailed: the ledger does not have what the receipt shows.
        """
        book = self._read()
        try:
            self._kept.keep(receipt, settled=lambda held: (held.ledger, held.head.digest) in book.settled)
        except OSError as error:
            raise Unwritable(f"{self._kept.path}: cannot be written: {error.strerror}") from None
        self.check([receipt])

    @property
    def kept(self) -> list[Receipt]:
        """The highest receipt of each witness."""
        return list(self._kept)

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._check_not_gone()
        self.path.touch(mode=0o600)

    def _check_not_gone(self) -> None:
        """That a ledger which is not there has left nothing behind."""
        left = self._custody.of_a_ledger()
        if left is not None and not self._recovering:
            raise VerificationFailed(
                f"{self.path}: is gone, and {left.name} of it is there: only it records what was spent",
                fix=RESTORE,
            )

    def _open(self) -> None:
        super()._open()
        if self._book.head.counter == 1:
            # Begun just now, or by a process that was killed before it came here.
            self._key = self._own_key()
            with self._transaction():
                begun = self._book.head.counter == 1
                if begun and noted_end(self._custody.notes(), self._book.key) is None:
                    self._note_anew(self._book.head)

    def _begin(self) -> None:
        # A recovery begins a ledger in one transaction with what it charges.
        if not self._recovering:
            super()._begin()

    def _new_key(self) -> IdentityKey:
        self._check_not_gone()
        custody = self._custody
        if custody.key.exists():
            return read_key(custody.key)
        key = IdentityKey.generate()
        # Under another name until the first entry is on disk: a crash in between leaves no ledger, and no
        # sign of one that is gone.
        write_atomic(custody.new_key, key.to_bytes(), mode=0o600)
        return key

    def _own_key(self) -> IdentityKey:
        custody = self._custody
        if not custody.key.exists():
            try:
                custody.new_key.replace(custody.key)
            except FileNotFoundError:
                # Or another process has just done it.
                if not custody.key.exists():
                    raise VerificationFailed(
                        f"{custody.key}: is gone, and signs the ledger beside it", fix=RESTORE
                    ) from None
        key = read_key(custody.key)
        if key.public != self._book.key:
            raise VerificationFailed(
                f"{custody.key}: is not the key that signs {self.path.name}", fix=RESTORE
            )
        return key

    def _sync(self) -> None:
        # A recovery begins a ledger where there is none.
        if not self._recovering or self._rows("SELECT 1 FROM sqlite_master LIMIT 1"):
            super()._sync()

    def _appended(self, head: Head) -> None:
        # In place, so that it costs one fsync more; notes take turns in two slots.
        handle = os.open(self._custody.head, os.O_WRONLY)
        try:
            note = self._note(head)
            if os.pwrite(handle, note, head.counter % 2 * SLOT) != len(note):
                raise OSError("written in part")
            os.fsync(handle)
        finally:
            os.close(handle)

    def _note_anew(self, head: Head) -> None:
        """Begin `ledger.head` with one note, whatever it held."""
        slots = [b"", b""]
        slots[head.counter % 2] = self._note(head)
        write_atomic(self._custody.head, b"".join(slot.ljust(SLOT, b"\0") for slot in slots), mode=0o600)

    def _note(self, head: Head) -> bytes:
        return encode(head.counter, head.digest, self._key.sign(HEAD, head.counter, head.digest))

    def _check_end(self) -> None:
        """That the ledger has all entries that were on disk when an append returned."""
        # Before the transaction, which reads the entries.
        end = noted_end(self._custody.notes(), self._book.key)
        with self._transaction("DEFERRED"):
            if end is None:
                raise VerificationFailed(
                    f"{self._custody.head}: is gone or damaged, so nobody can say where the ledger ended",
                    fix=RESTORE,
                )
            self._check(self._book.key, end, self._custody.head.name)

    def _recover(self, seen: list[Receipt], *, accept_loss: bool) -> Recovered:
        with self._transaction():
            begun = self._book.head.counter == 0
            if begun:
                super()._begin()
            end = noted_end(self._custody.notes(), self._book.key)
            heads = [(one.statement.ledger, one.statement.head) for one in seen]
            heads += [] if end is None else [(self._book.key, end)]
            answered = {
                (one.statement.ledger, one.statement.head)
                for one in seen
                if is_settled(self._book, self._entry, one.statement)
            }
            gone = {(key, head) for key, head in heads if not self._stands(key, head)} - answered
            # By the entries that charged them: what left by a branch that is gone left apart from what this
            # one knows of the same round.
            lost = {
                (told.ledger, told.entry): (told.data_set, charge)
                for told in (one.statement for one in seen)
                if (charge := told.charge) is not None and not self._stands(told.ledger, told.entry)
            }
            # A round is two entries, a charge and a commit.
            unexplained = max(0, self._entries_gone(gone, {head for key, head in heads}) - 2 * len(lost))
            blind = not seen and (begun or end is None)
            if (unexplained or blind) and not accept_loss:
                what = "nothing" if blind else f"no receipt, for {unexplained} entries that were seen,"
                raise PolicyRefused(
                    f"{self.path}: {what} shows what was spent",
                    fix="get the receipts of all peers; or lower budget.epsilon_total by what may be lost, "
                    "then lepton-fl budget recover --accept-loss",
                )
            if gone or lost or blind:
                # The entries too, so that no other receipt of one has it charged again.
                settled = sorted((key, head.counter, head.digest) for key, head in {*gone, *lost})
                self._append("", Recovery(tuple(settled), unexplained))
                for data_set, charge in sorted(lost.values(), key=lambda of: (of[0], of[1].run, of[1].round)):
                    self._append(data_set, RecoveredCharge(charge))
            head = self._book.head
        if begun:
            self._key = self._own_key()
        # Without the notes of the lost end, which may count further than the ledger does now. Where a crash
        # comes before this they are there, and settled.
        self._note_anew(head)
        return Recovered(len(lost), unexplained)

    def _stands(self, key: bytes, head: Head) -> bool:
        try:
            self._check(key, head, "")
        except VerificationFailed:
            return False
        return True

    def _entries_gone(self, gone: set[tuple[bytes, Head]], seen: set[Head]) -> int:
        """How many entries are gone, at most, by the highest head that was seen of each ledger."""
        own, total = self._book.key, 0
        for key in {key for key, _ in gone}:
            heads = {head for of, head in gone if of == key}
            if key != own:
                # Up to where an earlier recovery has counted.
                shared = max(1, self._book.lost_ends.get(key, NO_ENTRY).counter)
            elif min(head.counter for head in heads) > self._book.head.counter:
                shared = self._book.head.counter
            else:
                # The other branch left this one after the last head that is in both.
                shared = max((head.counter for head in seen - heads), default=1)
            total += max(0, max(head.counter for head in heads) - shared)
        return total


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery came to."""

    charged: int
    """Rounds that receipts show and the ledger had lost: charged."""
    lost: int
    """Entries that were seen to exist and that no receipt explains."""


def recover(path: Path, given: Iterable[Receipt], *, site: str, accept_loss: bool = False) -> Recovered:
    """Have a site's ledger go on after part or all of it was lost, charged for every round that others saw.

    What the ledger still has stays, and must verify. Rounds are charged under no limit: what is out is out.
    A receipt that should not be here could only make the site spend more, so whose receipts to take is left
    to the person who recovers.

    Guarantee: afterwards every round that a given or kept receipt of this `site` shows is charged, twice
    where two branches of the ledger have released it, and the ledger opens.

    Raises:
        PolicyRefused: entries were lost that no receipt explains; `accept_loss` records how many.
        ConfigError, VerificationFailed: what is there is no sound ledger.
    """
    ledger = Ledger(path, recovering=True)
    try:
        seen = [one for one in (*given, *ledger.kept) if one.statement.site == site]
        return ledger._recover(seen, accept_loss=accept_loss)
    except OSError as error:
        raise unusable(path, error) from None
    finally:
        ledger.close()
