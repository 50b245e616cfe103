use super::*;

/// Makes exactly one criterion fire.
fn provoke(group: &mut Group, cause: Cause) {
    match cause {
        Cause::Initial => group.obs.needs_full = true,
        Cause::Operator => group.obs.operator.hold_delta = true,
        Cause::LinkDown => {
            group.link(false);
            // Nothing is written, so that the link is all that is wrong.
            group.obs.usage_bytes_per_s = 0;
        }
        Cause::BackupRefused => group.obs.refused = Some("pool full: 0 of 64 MiB free".into()),
        Cause::Fill => group.obs.span_bytes = GIB * 91 / 100,
        Cause::Imbalance => group.obs.usage_bytes_per_s = 210 * MIB,
        Cause::LinkSlow => group.obs.oldest_sent_age_ms = Some(5000),
        Cause::CannotConverge => {}
        Cause::Redundancy => group.obs.ledger = LedgerTotals { cr_bytes: 300 * MIB, dr_bytes: 90 * MIB },
    }
}

fn expected(cause: Cause) -> Action {
    match cause {
        Cause::CannotConverge => Action::None,
        Cause::Redundancy => Action::StartRun { kind: RunKind::Redundancy },
        cause => Action::Switch { cause },
    }
}

#[test]
fn each_criterion_fires_alone_and_is_silent_when_it_is_switched_off() {
    for cause in Cause::ALL.iter().copied() {
        let mut group = Group::new();
        group.config.criteria = Criteria::of(&[cause]);
        group.quiet_for(60);
        provoke(&mut group, cause);
        let decision = group.until_action(10);
        if cause != Cause::CannotConverge {
            assert_eq!((group.actions.as_slice(), decision.cause), (&[expected(cause)][..], Some(cause)));
            assert!(decision.because.iter().any(|reason| reason.verdict == Verdict::Fires), "{decision}");
        }

        let mut group = Group::new();
        group.config.criteria = Criteria::all().without(cause);
        provoke(&mut group, cause);
        if cause != Cause::Initial {
            group.quiet_for(60);
        }
    }
}

#[test]
fn any_subset_fires_for_what_is_in_it() {
    let causes: Vec<Cause> = Cause::ALL.iter().copied().filter(|cause| *cause != Cause::Initial).collect();
    for subset in 0_u16..1 << causes.len() {
        let chosen: Vec<Cause> =
            causes.iter().copied().enumerate().filter(|(n, _)| subset >> n & 1 == 1).map(|(_, cause)| cause).collect();
        for provoked in &causes {
            let mut group = Group::new();
            group.config.criteria = Criteria::of(&chosen);
            provoke(&mut group, *provoked);
            group.until_action(5);
            let acts = chosen.contains(provoked) && *provoked != Cause::CannotConverge;
            let want = if acts { vec![expected(*provoked)] } else { vec![] };
            assert_eq!(group.actions, want, "{provoked} of {chosen:?}");
        }
    }
}

#[test]
fn a_link_that_is_back_before_the_timeout_was_never_gone() {
    let mut group = Group::new();
    group.obs.usage_bytes_per_s = MIB;
    group.link(false);
    group.quiet_for(1);
    group.link(true);
    group.quiet_for(60);
    group.link(false);
    assert_eq!(group.until_action(3).action, Action::Switch { cause: Cause::LinkDown });
    assert_eq!(group.obs.now_ms - group.obs.link_since_ms, 2000);
}

#[test]
fn a_link_that_is_down_is_the_cause_of_the_journal_that_fills() {
    let mut group = Group::new();
    group.obs.usage_bytes_per_s = 500 * MIB;
    group.link(false);
    let decision = group.until_action(3);
    assert_eq!(decision.action, Action::Switch { cause: Cause::LinkDown });
    assert_eq!(decision.reason(Rule::OverflowForecast).unwrap().verdict, Verdict::Fires);
}

#[test]
fn imbalance_is_predicted_or_a_plain_level() {
    // 100 MiB/s too much fill 1 GiB in 10.24 s: not below the horizon of 10 s until some of it is taken.
    let mut group = Group::new();
    group.obs.usage_bytes_per_s = 110 * MIB;
    group.quiet_for(30);
    group.obs.span_bytes = 30 * MIB;
    let decision = group.until_action(10);
    assert_eq!(decision.action, Action::Switch { cause: Cause::Imbalance });
    let forecast = decision.reason(Rule::OverflowForecast).unwrap();
    assert_eq!((forecast.value, forecast.threshold), (Some(9940), 10_000));

    // A quarter of the horizon is waited for, unless there is no time for it.
    let mut group = Group::new();
    group.obs.usage_bytes_per_s = 210 * MIB;
    let start = group.obs.now_ms;
    group.until_action(10);
    assert_eq!(group.obs.now_ms - start, 3000);
    let mut group = Group::new();
    group.obs.usage_bytes_per_s = 510 * MIB;
    assert_eq!(group.step().action, Action::Switch { cause: Cause::Imbalance });

    // A burst that ends within it is absorbed.
    let mut group = Group::new();
    for _ in 0..20 {
        group.obs.usage_bytes_per_s = 210 * MIB;
        group.quiet_for(2);
        group.obs.usage_bytes_per_s = 10 * MIB;
        group.quiet_for(2);
    }

    // The level alone (Fig. 8, step 420), whatever is free.
    let mut group = Group::new();
    group.config.overflow_horizon = Duration::ZERO;
    group.config.imbalance_bytes_per_second = MIB;
    group.obs.usage_bytes_per_s = 11 * MIB;
    group.quiet_for(30);
    group.obs.usage_bytes_per_s += 1;
    let decision = group.until_action(10);
    assert_eq!(decision.action, Action::Switch { cause: Cause::Imbalance });
    assert!(decision.reason(Rule::ImbalanceLevel).is_some() && decision.reason(Rule::OverflowForecast).is_none());
}

#[test]
fn fill_moves_the_group_that_owns_the_oldest_record_only() {
    let mut group = Group::new();
    group.obs.span_bytes = GIB;
    group.obs.owns_oldest = false;
    group.quiet_for(10);
    group.obs.owns_oldest = true;
    assert_eq!(group.step().action, Action::Switch { cause: Cause::Fill });
    // At the threshold it is not above it.
    let mut group = Group::new();
    group.obs.capacity_bytes = 1000;
    group.obs.span_bytes = 900;
    assert_eq!(group.weigh().action, Action::None);
    group.obs.span_bytes = 901;
    assert_eq!(group.weigh().action, Action::Switch { cause: Cause::Fill });
}

#[test]
fn redundancy_fires_above_its_ratio_and_floor_and_not_too_often() {
    let mut group = Group::new();
    group.config.redundancy_floor_bytes = 9000;
    // The patent's example: 9000 / 3000 is 3, which does not exceed 3.
    group.obs.ledger = LedgerTotals { cr_bytes: 9000, dr_bytes: 3000 };
    assert_eq!(group.obs.ledger.ratio(), Some(Ratio::from_millionths(3_000_000)));
    group.quiet_for(5);
    group.config.redundancy_ratio = Ratio::from_millionths(2_999_999);
    group.config.redundancy_floor_bytes = 9001;
    group.quiet_for(5);
    group.config.redundancy_floor_bytes = 9000;
    let hot = group.obs.ledger;
    assert_eq!(group.step().action, Action::StartRun { kind: RunKind::Redundancy });
    assert_eq!((group.obs.phase, group.obs.mode_cause), (Phase::FinalRound, Some(Cause::Redundancy)));
    group.quiet_for(1);
    group.run_ends(1000, true, 0);
    assert_eq!(group.obs.phase, Phase::Streaming);
    let began = group.obs.now_ms - 1000;
    group.obs.ledger = hot;
    group.until_action(120);
    assert_eq!(group.obs.now_ms - began, 60_000);
    // An aborted one doubles the interval, and the group returns as from any other cause.
    group.run_ends(1000, false, 0);
    assert_eq!(group.obs.phase, Phase::Tracking);
    assert_eq!(group.until_action(10).action, Action::StartRun { kind: RunKind::Final });
    group.run_ends(1000, true, 0);
    let began = began + 60_000;
    group.obs.ledger = hot;
    group.until_action(180);
    assert_eq!(group.obs.now_ms - began, 120_000);

    let mut group = Group::new();
    group.config.redundancy_floor_bytes = 0;
    group.quiet_for(5);
    group.obs.ledger = LedgerTotals { cr_bytes: 300 * MIB, dr_bytes: 90 * MIB };
    group.link(false);
    group.obs.usage_bytes_per_s = 0;
    group.quiet_for(1);
}

#[test]
fn a_group_acknowledged_by_both_sides_moves_for_the_link_only() {
    for cause in [Cause::Fill, Cause::Imbalance, Cause::Redundancy] {
        let mut group = Group::new();
        group.obs.both = true;
        provoke(&mut group, cause);
        group.quiet_for(60);
    }
    for cause in [Cause::Initial, Cause::Operator, Cause::LinkDown, Cause::BackupRefused, Cause::LinkSlow] {
        let mut group = Group::new();
        group.obs.both = true;
        provoke(&mut group, cause);
        assert_eq!(group.until_action(5).action, Action::Switch { cause });
    }
}

#[test]
fn run_traffic_is_neither_usage_nor_congestion() {
    // What trips other systems: the link is full of the run, probes are slow, held records get old.
    for phase in [Phase::Round, Phase::FullRun, Phase::FinalRound] {
        let mut group = Group::in_delta(Cause::LinkDown);
        group.obs.phase = phase;
        group.obs.run = Some(RunView { kind: RunKind::Final, started_ms: 60_000, total_bytes: 8 * GIB, done_bytes: 0 });
        group.obs.link_bytes_per_s = GIB;
        group.obs.flush_bytes_per_s = 0;
        group.obs.usage_bytes_per_s = 50 * MIB;
        group.obs.probe_rtt_ms = Some(30_000);
        group.obs.span_bytes = 100 * MIB;
        group.quiet_for(600);
    }
}
