use super::*;

const KINDS: [RunKind; 4] = [RunKind::Round, RunKind::Final, RunKind::Full, RunKind::Redundancy];

fn actions() -> Vec<Action> {
    let causes = || Cause::ALL.iter().copied();
    let mut all = vec![Action::None];
    all.extend(causes().map(|cause| Action::Switch { cause }));
    all.extend(causes().map(|cause| Action::Demote { cause }));
    all.extend(KINDS.map(|kind| Action::StartRun { kind }));
    all
}

#[test]
fn each_phase_takes_exactly_its_own_actions() {
    use Phase::{FinalRound, FullRun, Round, Streaming, Tracking};
    for phase in Phase::ALL.iter().copied() {
        for action in actions() {
            let expected = match (phase, action) {
                (_, Action::None) => Some(phase),
                (Streaming, Action::Switch { .. }) => Some(Tracking),
                (Streaming, Action::StartRun { kind: RunKind::Redundancy }) => Some(FinalRound),
                (Streaming, Action::StartRun { .. } | Action::Demote { .. }) => None,
                (Tracking, Action::StartRun { kind: RunKind::Round }) => Some(Round),
                (Tracking, Action::StartRun { kind: RunKind::Final }) => Some(FinalRound),
                (Tracking, Action::StartRun { kind: RunKind::Full }) => Some(FullRun),
                (Tracking, Action::StartRun { kind: RunKind::Redundancy }) => None,
                (Tracking, Action::Switch { .. } | Action::Demote { .. }) => None,
                (FinalRound, Action::Demote { .. }) => Some(Round),
                (FinalRound, Action::Switch { .. } | Action::StartRun { .. }) => None,
                (Round | FullRun, _) => None,
            };
            assert_eq!(phase.after(action), expected, "{action:?} in {phase}");
        }
    }
    for (phase, committed, aborted) in [
        (Streaming, None, None),
        (Tracking, None, None),
        (Round, Some(Tracking), Some(Tracking)),
        (FinalRound, Some(Streaming), Some(Tracking)),
        (FullRun, Some(Tracking), Some(Tracking)),
    ] {
        assert_eq!((phase.after_run(true), phase.after_run(false)), (committed, aborted), "{phase}");
    }
}

#[test]
fn each_cause_switches_a_streaming_group_in_the_order_of_weight() {
    let everything = |group: &mut Group| {
        group.obs.needs_full = true;
        group.obs.operator.hold_delta = true;
        group.link(false);
        group.obs.now_ms += 2000;
        group.obs.refused = Some("no space".into());
        group.obs.span_bytes = GIB * 95 / 100;
        group.obs.usage_bytes_per_s = GIB;
        group.obs.oldest_sent_age_ms = Some(60_000);
        group.obs.ledger = LedgerTotals { cr_bytes: 900 * MIB, dr_bytes: MIB };
    };
    let mut off = Vec::new();
    for cause in
        [Cause::Operator, Cause::LinkDown, Cause::BackupRefused, Cause::Fill, Cause::Imbalance, Cause::LinkSlow]
    {
        let mut group = Group::new();
        everything(&mut group);
        group.obs.needs_full = false;
        off.iter().for_each(|cause| group.config.criteria = group.config.criteria.without(*cause));
        assert_eq!(group.step().action, Action::Switch { cause });
        assert_eq!(group.obs.phase, Phase::Tracking);
        off.push(cause);
    }
    let mut group = Group::new();
    everything(&mut group);
    group.config.criteria = Criteria::NONE;
    assert_eq!(group.weigh().action, Action::Switch { cause: Cause::Initial });
}

/// Whatever is observed, in whatever order and phase: every action is legal in its phase, no run begins without a
/// link, none returns while a cause holds, and the state survives being written down.
#[test]
fn any_observation_gets_a_legal_answer() {
    use proptest::prelude::*;
    let observation = (
        (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>(), 0_u64..100_000),
        (any::<[bool; 6]>(), any::<[u32; 8]>()),
    );
    proptest!(|(steps in prop::collection::vec(observation, 1..60), bits in any::<u16>())| {
        let mut group = Group::new();
        let kept = Cause::ALL.iter().copied().filter(|cause| bits >> (*cause as u16) & 1 == 1);
        group.config.criteria = Criteria::of(&kept.collect::<Vec<_>>());
        for ((phase, cause, up, passed), (flags, n)) in steps {
            let obs = &mut group.obs;
            obs.now_ms += passed;
            obs.phase = *phase.get(Phase::ALL);
            obs.mode_cause = obs.phase.is_delta().then(|| *cause.get(Cause::ALL));
            if up != obs.link_up {
                (obs.link_up, obs.link_since_ms) = (up, obs.now_ms);
            }
            obs.owns_oldest = flags[0];
            obs.both = flags[1];
            obs.refused = flags[2].then(String::new);
            obs.operator = OperatorRequest { hold_delta: flags[3], start_run: flags[4] };
            obs.needs_full = flags[5];
            obs.span_bytes = u64::from(n[0]) / 4;
            obs.usage_bytes_per_s = n[1].into();
            obs.flush_bytes_per_s = n[2].into();
            obs.ledger = LedgerTotals { cr_bytes: n[3].into(), dr_bytes: u64::from(n[3] / 5) };
            obs.dirty_bytes = n[4].into();
            obs.oldest_sent_age_ms = flags[0].then_some(u64::from(n[5] % 20_000));
            obs.probe_rtt_ms = flags[1].then_some(u64::from(n[6] % 5000));
            obs.last_run = flags[2].then(|| LastRun {
                kind: KINDS[n[7] as usize % 4],
                committed: flags[3],
                bytes: n[4].into(),
                duration_ms: u64::from(n[6] % 10_000),
                ended_ms: obs.now_ms - obs.now_ms % 3000,
                refused: flags[4].then(String::new),
            });
            let before = serde_json::to_string(&group.policy).unwrap();
            let mut copy: GroupPolicy = serde_json::from_str(&before).unwrap();
            let decision = group.weigh();
            let line = serde_json::to_string(&group.obs).unwrap();
            prop_assert_eq!(&copy.on_observation(&group.config, &serde_json::from_str(&line).unwrap()), &decision);
            let text = serde_json::to_string(&decision).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Decision>(&text).unwrap(), &decision);
            if let Action::StartRun { kind } = decision.action {
                prop_assert!(group.obs.link_up);
                prop_assert!(kind != RunKind::Final || decision.holds.is_empty());
            }
            if let Action::Switch { cause } | Action::Demote { cause } = decision.action {
                prop_assert!(group.config.criteria.contains(cause));
            }
        }
    });
}
