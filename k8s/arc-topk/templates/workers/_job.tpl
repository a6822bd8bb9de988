{{/* What follows `kind: Job`'s metadata. The name's hash is taken of it. */}}
{{- define "arc-topk.jobSpec" -}}
{{- $pool := .pool }}
completionMode: Indexed
completions: {{ $pool.most }}
parallelism: {{ $pool.most }}
backoffLimit: {{ int $pool.job.backoffLimit }}
{{- if $pool.job.suspend }}
suspend: true
{{- end }}
{{- if not (kindIs "invalid" $pool.job.ttlSecondsAfterFinished) }}
ttlSecondsAfterFinished: {{ int $pool.job.ttlSecondsAfterFinished }}
{{- end }}
{{- if not (kindIs "invalid" $pool.job.activeDeadlineSeconds) }}
activeDeadlineSeconds: {{ int $pool.job.activeDeadlineSeconds }}
{{- end }}
podFailurePolicy:
  rules:
    # Evicted, preempted, or the node is gone: no fault of the worker's. Its replacement joins the job.
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    {{- with $pool.job.failOnExitCodes }}
    - action: FailJob
      # Kubernetes 1.28 misses the field, though it needs nothing in it.
      onPodConditions: []
      onExitCodes:
        containerName: worker
        operator: In
        values:
          {{- toYaml . | nindent 10 }}
    {{- end }}
{{- if and $pool.job.succeedWithMinReplicas (lt $pool.start $pool.most) (semverCompare ">=1.31.0-0" .root.Capabilities.KubeVersion.Version) }}
# When those that training cannot do without are done, it is done, and pods that still wait for a node are not wanted.
successPolicy:
  rules:
    - succeededCount: {{ max 1 $pool.start }}
{{- end }}
template:
  {{- include "arc-topk.workerPod" . | trim | nindent 2 }}
{{- end }}
