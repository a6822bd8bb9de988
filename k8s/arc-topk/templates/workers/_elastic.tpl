{{/* Spec of a StatefulSet or Deployment. */}}
{{- define "arc-topk.elasticSpec" -}}
{{- $pool := .pool }}
{{- if not $pool.autoscaling.enabled }}
replicas: {{ $pool.most }}
{{- end }}
selector:
  matchLabels:
    {{- include "arc-topk.poolSelector" . | nindent 4 }}
{{- if eq $pool.kind "StatefulSet" }}
serviceName: {{ include "arc-topk.poolName" . }}
podManagementPolicy: Parallel
updateStrategy:
  {{- toYaml (default (dict "type" "RollingUpdate") $pool.updateStrategy) | nindent 2 }}
{{- else }}
strategy:
  {{- $oneByOne := dict "type" "RollingUpdate" "rollingUpdate" (dict "maxSurge" 0 "maxUnavailable" 1) }}
  {{- toYaml (default $oneByOne $pool.updateStrategy) | nindent 2 }}
{{- end }}
template:
  {{- include "arc-topk.workerPod" . | trim | nindent 2 }}
{{- with $pool.volumeClaimTemplates }}
volumeClaimTemplates:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
