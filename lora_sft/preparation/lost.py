"""The account of all rows, and what became of them → a refusal if too many were lost, with the reasons."""

from lora_sft.data.intake import Intake
from lora_sft.errors import DataError
from lora_sft.preparation.prepare import Prepared, some

ANYWAY = "if this is as it should be, raise max_lost_share"


def refuse_losses(found: Prepared, intake: Intake, share: float) -> None:
    """Raises if more than a share of the rows is lost, or repeats other rows.

    Lost is a row that is left out because it is bad, too long or has nothing to learn, or that is shortened. A row that
    says the same as one before is not lost, but the others weigh the less; it is counted apart.

    Args:
        share: of all rows that were read, between 0 and 1.

    Raises:
        DataError: how many rows, for what reasons, and what can be done.
    """
    lost = {
        f"{intake.grave:,} cannot be trained on (see bad_rows.jsonl, or `lora-sft validate`)": intake.grave,
        f"{_rows(found.too_long)} longer than max_length": len(set(found.too_long)),
        f"{found.cut:,} shortened to max_length": found.cut,
        f"{_rows(found.without_reply)} without a token to learn": len(set(found.without_reply)),
    }
    count = min(sum(lost.values()), intake.rows)
    problems = []
    if count > share * intake.rows:
        reasons = "; ".join(words for words, number in lost.items() if number)
        advice = "raise max_length, mend the rows, or" if found.too_long or found.cut else "mend the rows, or"
        problems.append(
            f"{count:,} of {intake.rows:,} rows would be lost, more than max_lost_share {share:g}: {reasons}; "
            f"{advice} {ANYWAY}"
        )
    if intake.duplicates > share * intake.rows:
        problems.append(
            f"{intake.duplicates:,} of {intake.rows:,} rows say the same as one before, more than max_lost_share "
            f"{share:g} (`lora-sft validate` names them); leave them out, or {ANYWAY}"
        )
    if problems:
        raise DataError.of(problems)


def _rows(sources: list[str]) -> str:
    return some(list(dict.fromkeys(sources))).removesuffix(" are").removesuffix(" is") if sources else ""
