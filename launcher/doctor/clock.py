"""Whether somebody keeps this host's clock right."""

from launcher.doctor.ask import ask
from launcher.doctor.finding import Finding, ok, warn


def keeper() -> Finding:
    """What systemd or chrony say; containers have neither, and take their host's clock."""
    hint = "start chrony or systemd-timesyncd: several nodes must agree to a few seconds"
    said = ask(["timedatectl", "show", "-p", "NTPSynchronized", "--value"], timeout_s=5.0)
    if said.good and said.out.strip() in {"yes", "no"}:
        if said.out.strip() == "yes":
            return ok("time service", "the clock is synchronized")
        return warn("time service", "the clock is not synchronized", hint)
    said = ask(["chronyc", "-c", "tracking"], timeout_s=5.0)
    fields = said.out.strip().split(",")
    if said.good and len(fields) > 4:
        fact = f"chrony is {float(fields[4]):+.4f} s off its source"
        if fields[2] != "0":
            return ok("time service", fact)
        return warn("time service", "chrony has no source", hint)
    return ok("time service", "not known here (neither systemd nor chrony answers)")
