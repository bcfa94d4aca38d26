"""The source text of a cause in a package that is not ours."""

CAUSE = """
    from lightning_spike.diagnosis.cause import Cause, Fix
    from lightning_spike.diagnosis.observation import Observation, observer
    from lightning_spike.records import Family

    @observer("full")
    def phase(view):
        return Observation(level="full", text="The moon was full.", signal="moon", step=view.step)

    MOON = Cause(
        id="full_moon", family=Family.ENVIRONMENT, title="A full moon", meaning="the moon shines on the loss",
        observations=(phase,), summary=lambda view: "It was the moon.", fixes=lambda view: (Fix("Wait 14 days."),),
        weights={"phase": {"full": 30.0}}, explains=frozenset({"bad_batch"}),
    )
"""
